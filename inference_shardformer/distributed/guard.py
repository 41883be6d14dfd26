"""RankGuard: one failing rank makes every rank fail, within seconds and with the same named error."""

from __future__ import annotations

import atexit
import json
import os
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TypeVar

from inference_shardformer.distributed.board import FAILURE, Board, Seat
from inference_shardformer.distributed.environment import JOIN_TIMEOUT_S
from inference_shardformer.distributed.hub import HubBoard
from inference_shardformer.distributed.member import MemberBoard
from inference_shardformer.distributed.records import FailureRecord, Outcome, error_of_phase
from inference_shardformer.distributed.stall import Progress
from inference_shardformer.distributed.tensor_parallel import TensorParallelGroup, joining
from inference_shardformer.distributed.wire import connect_to_leader
from inference_shardformer.errors import EnvironmentMismatchError, StateError

T = TypeVar("T")

_RECORD_WAIT_S = 3.0
_SETTLE_S = 0.2
_OUTSIDE = "between steps"


class RankGuard:
    """Watches over the ranks of one group; all of them create it, and call it in the same order.

    A rank that raises, dies or stalls inside a step ends the group: every rank raises the same `RankFailure`, and so
    does every later call. `timeout_s` is how long ranks wait for one that is late. With one rank nothing is wrapped.
    """

    def __init__(self, group: TensorParallelGroup, *, timeout_s: float) -> None:
        self._group = group
        self._has_failed = False
        self._process = os.getpid()
        self._now = (0, False, 0.0, _OUTSIDE)  # replaced as a whole: the board's thread reads it
        self._board: Board | None = None  # with one rank there is none
        if group.size > 1:
            with joining(group.size):
                lines = connect_to_leader(group, timeout_s=max(timeout_s, JOIN_TIMEOUT_S))
            board = HubBoard if group.rank == 0 else MemberBoard
            self._board = board(Seat(group.rank, group.size, timeout_s, self._progress, group.abort), lines)
            atexit.register(self.close)

    def together(self, phase: str, fn: Callable[[], T]) -> T:
        """Run `fn` on every rank; return its result once it has succeeded on all of them.

        Where it failed somewhere, every rank raises the same error: the typed one of the lowest rank that failed, or a
        `RankFailure` for any other exception.
        """
        if self._group.size == 1:
            return fn()
        self._move(phase)
        begun = time.monotonic()
        result, error = self._attempt(phase, fn)
        answers = self._exchange(phase, Outcome.of(error).to_json(), patience_s=time.monotonic() - begun)
        common = error_of_phase([Outcome.from_json(answer) for answer in answers], phase=phase)
        if common is not None:
            self._has_failed = common.is_shared = True
            raise common from error
        return result[0]

    def agree(self, phase: str, facts: Mapping[str, str]) -> None:
        """Compare facts between all ranks.

        Raises:
            EnvironmentMismatchError: they differ; the text is the same on every rank.
        """
        if self._group.size == 1:
            return
        self._move(phase)
        answers = [json.loads(answer) for answer in self._exchange(phase, json.dumps(dict(facts)), patience_s=0.0)]
        fields = sorted(set().union(*answers))
        conflicts = [text for field in fields if (text := _conflict(field, [answer.get(field) for answer in answers]))]
        if conflicts:
            differing = EnvironmentMismatchError(
                f"the ranks disagree during {phase}: " + "; ".join(conflicts),
                remedy="start every rank with the same arguments, configuration, files and package versions",
            )
            self._has_failed = differing.is_shared = True
            raise differing

    def step(self, phase: str) -> _Step:
        """A context for one step of the engine."""
        return _Step(self, phase)

    def close(self) -> None:
        """Stop watching. Idempotent. After a failure the other ranks first let rank 0 say why, for 3 s at most."""
        board, self._board = self._board, None
        if board is None:
            return
        atexit.unregister(self.close)
        if os.getpid() != self._process:  # a forked process has copies of the connections, but not the thread
            return
        rank, size = self._group.rank, self._group.size
        board.post(f"closed/{rank}", "")
        if rank == 0:
            peers = range(1, size)
            board.wait(lambda seen: all(f"closed/{k}" in seen or f"lost/{k}" in seen for k in peers), timeout_s=2.0)
        elif self._has_failed or board.failure is not None:
            board.wait(lambda seen: "lost/0" in seen, timeout_s=_RECORD_WAIT_S)
            time.sleep(_SETTLE_S)
        else:
            board.wait(lambda seen: f"closed/{rank}" in seen or "lost/0" in seen, timeout_s=1.0)
        board.close()

    def _progress(self) -> Progress:
        count, is_waiting, patience_s, phase = self._now
        return Progress(count, self._group.num_collectives, is_waiting, patience_s, phase)

    def _open(self) -> Board:
        if self._board is None:
            raise StateError("this rank guard is closed", remedy="a closed engine cannot run; create another one")
        if os.getpid() != self._process:
            raise StateError(
                f"this process was forked from rank {self._group.rank}, which is process {self._process}",
                remedy="use the engine there alone; start processes with the method 'spawn', or before the engine",
            )
        failure = self._board.failure
        if failure is not None:
            raise failure.to_error()
        return self._board

    def _move(self, phase: str, *, is_waiting: bool = False, patience_s: float = 0.0) -> None:
        self._now = (self._now[0] + 1, is_waiting, patience_s, phase)

    def _attempt(self, phase: str, fn: Callable[[], T]) -> tuple[list[T], Exception | None]:
        self._open()
        try:
            return [fn()], None
        except Exception as exc:  # noqa: BLE001 - the boundary at which an error of one rank becomes one of all ranks
            return [], exc
        except BaseException as exc:
            self._record(phase, exc)
            raise

    def _exchange(self, phase: str, answer: str, *, patience_s: float) -> list[str]:
        """Hand every rank's answer to every rank. Peers may be late by the timeout and `patience_s`."""
        board = self._open()
        self._move(phase, is_waiting=True, patience_s=patience_s)
        keys = [f"answer/{self._now[0]}/{rank}" for rank in range(self._group.size)]
        board.post(keys[self._group.rank], answer)
        board.wait(lambda seen: FAILURE in seen or all(key in seen for key in keys))
        answers = board.take(keys)
        self._move(_OUTSIDE)
        if answers is None:
            self._open()
        return answers or []

    def _begin(self, phase: str) -> None:
        if self._group.size > 1:
            self._open()
            self._move(phase, is_waiting=True)

    def _end(self) -> None:
        self._now = (self._now[0], False, 0.0, _OUTSIDE)

    def _end_with(self, phase: str, exc: BaseException) -> None:
        known = self._record(phase, exc)
        if isinstance(exc, Exception):
            raise known.to_error() from (exc if known.rank == self._group.rank else None)

    def _record(self, phase: str, exc: BaseException) -> FailureRecord:
        """Tell the other ranks, or learn from them what really happened; returns what all ranks know."""
        board = self._board
        own = FailureRecord.of(exc, rank=self._group.rank, phase=phase)
        if board is None:
            return own
        if self._group.is_in_collective and isinstance(exc, Exception):
            board.wait(lambda seen: FAILURE in seen, timeout_s=_RECORD_WAIT_S)
        board.post(FAILURE, own.to_json())
        board.wait(lambda seen: FAILURE in seen, timeout_s=_RECORD_WAIT_S)
        known = board.failure or own
        self._group.abort()
        others = [str(rank) for rank in range(self._group.size) if rank != known.rank]
        board.wait(
            lambda seen: "lost/0" in seen or all(f"seen/{k}" in seen or f"lost/{k}" in seen for k in others),
            timeout_s=_RECORD_WAIT_S,
        )
        return known


class _Step:
    """The context of `RankGuard.step`."""

    def __init__(self, guard: RankGuard, phase: str) -> None:
        self._guard = guard
        self._phase = phase

    def __enter__(self) -> None:
        self._guard._begin(self._phase)

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._guard._group.size == 1:
            return
        if exc is None:
            self._guard._end()
            return
        self._guard._end_with(self._phase, exc)


def _conflict(field: str, values: list[str | None]) -> str:
    """Who says what about a field, when they do not all say the same."""
    if len(set(values)) == 1:
        return ""
    sides = []
    for value in dict.fromkeys(values):
        ranks = [str(rank) for rank, other in enumerate(values) if other == value]
        who = f"rank {ranks[0]} has" if len(ranks) == 1 else f"ranks {', '.join(ranks)} have"
        sides.append(f"{who} {'nothing' if value is None else repr(value)}")
    return f"{field}: " + ", ".join(sides)
