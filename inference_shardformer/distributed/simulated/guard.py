"""SimulatedGuard: a RankGuard without processes to watch; a rank that fails makes every rank fail by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from inference_shardformer.distributed.guard import RankGuard
from inference_shardformer.distributed.records import FailureRecord
from inference_shardformer.distributed.simulated.errors import DeadlockError
from inference_shardformer.distributed.simulated.group import SimulatedGroup
from inference_shardformer.distributed.tensor_parallel import TensorParallelGroup
from inference_shardformer.errors import StateError

T = TypeVar("T")


class SimulatedGuard(RankGuard):
    """The guard of one simulated rank. Nothing can stall: a rank that waits for ever is found at once."""

    def __init__(self, group: SimulatedGroup) -> None:
        super().__init__(TensorParallelGroup.single(group.device), timeout_s=1.0)  # which watches nothing
        self._group = self._simulated = group
        self._is_open = True

    def close(self) -> None:
        """Stop guarding. Idempotent."""
        self._is_open = False

    def _check(self) -> None:
        if not self._is_open:
            raise StateError("this rank guard is closed", remedy="a closed engine cannot run; create another one")
        self._simulated.check()

    def _attempt(self, phase: str, fn: Callable[[], T]) -> tuple[list[T], Exception | None]:
        self._check()
        try:
            return [fn()], None
        except DeadlockError:
            raise  # every rank raises it by itself
        except Exception as exc:  # noqa: BLE001 - the boundary at which an error of one rank becomes one of all ranks
            return [], exc

    def _exchange(self, phase: str, answer: str, *, patience_s: float) -> list[str]:
        self._check()
        return self._simulated.exchange(f"the end of {phase!r}", answer)

    def _begin(self, phase: str) -> None:
        self._check()

    def _end_with(self, phase: str, exc: BaseException) -> None:
        if isinstance(exc, DeadlockError) or not isinstance(exc, Exception):
            return
        own = FailureRecord.of(exc, rank=self._simulated.rank, phase=phase)
        raise self._simulated.fail(own.to_error) from exc
