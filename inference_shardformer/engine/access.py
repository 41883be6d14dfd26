"""EngineAccess: the way to an engine's desk, one call at a time and only while the engine is ready."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Literal

from inference_shardformer.engine.calls import Call
from inference_shardformer.engine.desk import RequestDesk
from inference_shardformer.engine.fair_lock import FairLock
from inference_shardformer.engine.live_updates import LiveUpdates
from inference_shardformer.engine.outputs import StepStats
from inference_shardformer.errors import EnvironmentMismatchError, RankFailure, StateError


class EngineAccess:
    """Says which calls are legal, runs steps, and ends the engine when its ranks fail.

    Whoever reads or changes anything holds `lock`, which serves in order of arrival; the methods that take it say so.
    A stream that nobody reads any more may be closed by the garbage collector, in any thread and in the middle of a
    step: what it left is given up by whoever has the lock next, or has it now and comes to the end of a step.
    """

    def __init__(self, desk: RequestDesk, updates: LiveUpdates) -> None:
        self.lock = FairLock()
        self._desk: RequestDesk | None = desk
        self._updates = updates
        self._state: Literal["ready", "failed", "closed"] = "ready"
        self._abandoned: deque[Call] = deque()

    def desk(self, name: str) -> RequestDesk:
        """The desk, for the call of this name. Raises `StateError` where that is illegal."""
        if self._desk is None or self._state != "ready":
            raise self.illegal(name)
        if self.lock.is_outermost():
            self._settle()
        return self._desk

    def illegal(self, name: str) -> StateError:
        """What a call gets that is illegal now."""
        legal = "close()" if self._state == "failed" else "close(), which does nothing more"
        return StateError(
            f"{name} on an engine that is {self._state}", remedy=f"legal calls: {legal}; attach the model again"
        )

    def refuse_in_callback(self, name: str) -> None:
        """Raise `StateError` while the subscribers of an update are being asked."""
        if self._updates.is_asking:
            raise StateError(
                f"{name} by a callback of a running update",
                remedy="legal calls in a callback: reading, subscribe(), update_config() (its turn comes afterwards)",
            )

    def step(self, name: str) -> StepStats:
        """Run one step for the call of this name. What reaches all ranks ends the engine."""
        self.refuse_in_callback(name)
        with self.ending():
            stats = self.desk(name).step()
            self._settle()
            return stats

    def step_for(self, call: Call, name: str) -> StepStats | None:
        """Take the lock and run a step; None if another thread has just finished the call's requests."""
        with self.lock:
            return self.step(name) if call.is_open else None

    def ending(self) -> _Ending:
        """A context that ends the engine if its ranks fail, or turn out to differ."""
        return _Ending(self)

    def fail(self) -> None:
        """No call is legal from now on but `close()`."""
        self._state = "failed"

    @contextmanager
    def dropping(self, call: Call) -> Iterator[None]:
        """Give up the call's requests if it does not come to its end. A stream that is closed waits for no lock."""
        try:
            yield
        except GeneratorExit:
            self._abandoned.append(call)
            if self.lock.try_enter():
                self._settle()
                self.lock.__exit__()
            raise
        except BaseException:
            with self.lock:
                if self._desk is not None:
                    self._desk.abandon(call)
            raise

    def close(self) -> None:
        """No call is legal from now on."""
        self._state = "closed"
        self._desk = None

    def _settle(self) -> None:
        """Give up what closed streams left. The lock is held, and no step runs."""
        while self._abandoned:
            call = self._abandoned.popleft()
            if self._desk is not None:
                self._desk.abandon(call)


class _Ending:
    """The context of `EngineAccess.ending`; a class, because every step enters it."""

    def __init__(self, access: EngineAccess) -> None:
        self._access = access

    def __enter__(self) -> None:
        return

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(exc, (RankFailure, EnvironmentMismatchError)):
            self._access.fail()
