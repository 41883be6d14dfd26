"""SimulatedGroup: the collectives of a TensorParallelGroup between threads of one process."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from inference_shardformer.distributed.all_reduce import AllReduceChoice
from inference_shardformer.distributed.simulated.reduction import ReductionOrder, reduce_sum
from inference_shardformer.distributed.simulated.turns import Combine, MakeError, Place, Turns
from inference_shardformer.distributed.tensor_parallel import TensorParallelGroup
from inference_shardformer.errors import InferenceShardformerError, RankFailure, StateError


class SimulatedGroup(TensorParallelGroup):
    """One rank's end of a simulated group. All ranks make it, as with a real one, and in the same order.

    Sums are made in the order `order` names, so that a simulation equals real ranks bit for bit.
    """

    def __init__(self, turns: Turns, place: Place, *, rank: int, order: ReductionOrder) -> None:
        super().__init__(None, None, device=torch.device("cpu"))
        self.rank = rank
        self.size = turns.size
        if self.size > 1:  # no sum over shared memory, which native code could make by itself
            self.all_reduce_choice = AllReduceChoice("simulated")
        self._turns = turns
        self._place = place
        self._order = order
        self._is_open = True

    @property
    def is_closed(self) -> bool:
        """Whether it was closed."""
        return not self._is_open

    def all_reduce(self, t: torch.Tensor) -> torch.Tensor:
        """Sum `t` over the ranks, in place; returns `t`."""

        def combine(parts: list[object]) -> Sequence[object]:
            return [reduce_sum(_tensors(parts), self._order)] * self.size

        return t.copy_(_tensor(self._meet(f"all_reduce of {_shown(t)}", t, combine)))

    def all_gather(self, t: torch.Tensor, dim: int = -1) -> torch.Tensor:
        """Concatenate every rank's `t` along `dim`, in rank order. All ranks bring the same shape."""

        def combine(parts: list[object]) -> Sequence[object]:
            return [torch.cat(_tensors(parts), dim=dim) for _ in parts]

        return _tensor(self._meet(f"all_gather of {_shown(t)} along {dim}", t, combine))

    def broadcast(self, t: torch.Tensor, *, src: int = 0) -> torch.Tensor:
        """Overwrite `t` with that of group rank `src`, in place; returns `t`."""

        def combine(parts: list[object]) -> Sequence[object]:
            return [_tensor(parts[src]).clone()] * self.size

        return t.copy_(_tensor(self._meet(f"broadcast of {_shown(t)} from rank {src}", t, combine)))

    def broadcast_bytes(self, payload: bytes | None, *, src: int = 0) -> bytes:
        """Hand a message of group rank `src` to every rank."""

        def combine(parts: list[object]) -> Sequence[object]:
            return [parts[src] or b""] * self.size

        return bytes(self._meet(f"broadcast_bytes from rank {src}", payload, combine))  # type: ignore[call-overload]

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self._meet("barrier", None, lambda parts: parts)

    def exchange(self, what: str, text: str) -> list[str]:
        """Every rank's text, in rank order; no collective, so it is not counted."""
        return list(self._turns.meet(self._place, self.rank, what, text, lambda parts: [parts] * self.size))  # type: ignore[call-overload]

    def fail(self, make_error: MakeError) -> InferenceShardformerError:
        """End the group for all ranks with this error, unless it has failed before; returns the error that counts."""
        return self._turns.fail(self._place, make_error)

    def check(self) -> None:
        """Raise the error the group has failed with, if it has."""
        if self._place.error is not None:
            raise self._place.error()

    def abort(self) -> None:
        """Give the group up without waiting for anybody: ranks that wait for this one raise."""
        rank = self.rank
        self.fail(lambda: RankFailure(rank=rank, phase="a collective", cause="it gave its connections up"))
        self.close()

    def close(self) -> None:
        """Collectives are illegal afterwards. Idempotent."""
        self._is_open = False

    def _meet(self, what: str, brings: object, combine: Combine) -> object:
        if self.size > 1 and not self._is_open:
            raise StateError(
                "this tensor-parallel group is closed", remedy="collectives are legal only before close() or a failure"
            )
        self.num_collectives += 1
        self.is_in_collective = True
        result = self._turns.meet(self._place, self.rank, what, brings, combine)
        self.is_in_collective = False
        return result


def _shown(t: torch.Tensor) -> str:
    return f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}"


def _tensor(part: object) -> torch.Tensor:
    if not isinstance(part, torch.Tensor):
        raise TypeError(f"a {type(part).__name__} was brought to a collective of tensors")
    return part


def _tensors(parts: list[object]) -> list[torch.Tensor]:
    return [_tensor(part) for part in parts]
