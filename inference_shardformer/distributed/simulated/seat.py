"""SimulatedSeat: a rank's place in a simulation, given where a process group is asked for."""

from __future__ import annotations

from typing import NoReturn

from inference_shardformer.distributed.simulated.group import SimulatedGroup
from inference_shardformer.distributed.simulated.guard import SimulatedGuard
from inference_shardformer.distributed.simulated.reduction import ReductionOrder
from inference_shardformer.distributed.simulated.turns import Turns
from inference_shardformer.errors import EnvironmentMismatchError


class SimulatedSeat:
    """One rank of one simulation. `InferenceShardformer(process_group=seat)` joins it as it would a process group."""

    def __init__(self, turns: Turns, rank: int, *, order: ReductionOrder) -> None:
        self._turns = turns
        self._rank = rank
        self._order: ReductionOrder = order
        self._num_groups = 0

    def rank(self) -> int:
        """This rank."""
        return self._rank

    def size(self) -> int:
        """The number of ranks."""
        return self._turns.size

    def join(self, tp_size: int | None, *, all_reduce: str = "auto") -> tuple[SimulatedGroup, SimulatedGuard]:
        """A new group over all ranks, and its guard; every rank must call this.

        An `all_reduce` of "gloo" or "shm" is imitated in its rounding; otherwise it is that of the simulation.
        """
        if tp_size not in (None, self.size()):
            _refuse(tp_size, self.size())
        place = self._turns.place(self._num_groups)
        self._num_groups += 1
        asked: dict[str, ReductionOrder] = {"gloo": "gloo", "shm": "shm"}
        group = SimulatedGroup(self._turns, place, rank=self._rank, order=asked.get(all_reduce, self._order))
        return group, SimulatedGuard(group)


def _refuse(tp_size: int | None, size: int) -> NoReturn:
    raise EnvironmentMismatchError(
        f"tp_size={tp_size}, but the simulation has {size} rank{'s' if size > 1 else ''}; the two must be equal",
        remedy=f"ask for tp_size={size} or 'auto', or simulate {tp_size} ranks",
    )
