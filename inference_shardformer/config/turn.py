"""WriterTurn: one transaction at a time, whichever thread it comes from; nobody waits for ever."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Condition, Lock, current_thread, get_ident
from time import monotonic

from inference_shardformer.errors import StateError


class WriterTurn:
    """Who may write. A turn is taken for one call, or kept back between calls for a prepared transaction.

    Waiting ends after `wait_s` seconds with a StateError that names the thread in the way: what would be a deadlock
    (a callback that joins a thread which updates, a prepared update that is forgotten) becomes an error.
    """

    def __init__(self, wait_s: float) -> None:
        self._wait_s = wait_s
        self._condition = Condition(Lock())
        self._owner: int | None = None
        self._owner_name = ""
        self._keeper: int | None = None

    @property
    def is_mine(self) -> bool:
        """Whether this thread has the turn now, that is, whether a callback is asking."""
        return self._owner == get_ident()

    @contextmanager
    def taken(self, *, even_if_kept: bool = False) -> Iterator[None]:
        """Take the turn, for the body. `even_if_kept`: also while it is kept back, to end that."""
        deadline = monotonic() + self._wait_s
        if self.is_mine:
            raise StateError(
                "a callback of a running update may not prepare, commit, roll back or close",
                remedy="legal calls in a callback: reading, update() (it is queued), subscribe() and unsubscribing",
            )
        if not self._condition.acquire(timeout=self._wait_s):
            raise self._busy("is updating")
        try:
            if not even_if_kept:
                self._wait_until_free(deadline)
            self._owner, self._owner_name = get_ident(), current_thread().name
            yield
        finally:
            self._owner = None
            self._condition.release()

    def keep(self) -> None:
        """Keep every other writer out after this turn, until `let_go`. Called with the turn."""
        self._keeper = get_ident()

    def let_go(self) -> None:
        """Let writers in again. Called with the turn."""
        self._keeper = None
        self._condition.notify_all()

    def _wait_until_free(self, deadline: float) -> None:
        if self._keeper == get_ident():
            raise StateError(
                "this thread prepared an update that is neither committed nor rolled back",
                remedy="legal calls now: commit(), rollback(), close(), reading, subscribe()",
            )
        if not self._condition.wait_for(lambda: self._keeper is None, timeout=max(0.0, deadline - monotonic())):
            raise self._busy("prepared an update that is neither committed nor rolled back")

    def _busy(self, what: str) -> StateError:
        return StateError(
            f"waited {self._wait_s:g} s for the thread {self._owner_name!r}, which {what}",
            remedy="a callback may not wait for another thread that updates; end a prepared update with commit() or "
            "rollback()",
        )
