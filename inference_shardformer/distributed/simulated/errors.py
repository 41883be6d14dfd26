"""What the ranks of a simulation raise when none of them can go on."""

from __future__ import annotations

from collections.abc import Mapping

from inference_shardformer.errors import RankFailure


class DeadlockError(RankFailure):
    """The ranks entered different collectives, or one ended while others waited for it.

    `waiting` tells by rank what each one was in ("has ended" for one that is gone), `stacks` its Python stack there.
    """

    code = "deadlock"

    def __init__(self, *, rank: int, phase: str, waiting: Mapping[int, str], stacks: Mapping[int, str]) -> None:
        told = "; ".join(f"rank {number} {what}" for number, what in sorted(waiting.items()))
        shown = "".join(f"\n  rank {number}:\n{stack}" for number, stack in sorted(stacks.items()))
        super().__init__(
            rank=rank,
            phase=phase,
            cause=f"the ranks can never meet: {told}{shown}",
            cause_code=self.code,
            remedy="let every rank enter the same collectives, in the same order and with the same shapes; compare the "
            "lines of the policy or module where the stacks part",
        )
        self.waiting = dict(waiting)
        self.stacks = dict(stacks)
