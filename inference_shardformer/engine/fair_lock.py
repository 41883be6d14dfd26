"""FairLock: a reentrant lock that serves threads in the order in which they came."""

from __future__ import annotations

from collections import deque
from threading import Lock, get_ident
from typing import NamedTuple


class _Waiting(NamedTuple):
    thread: int
    gate: Lock  # held while this thread waits; whoever hands the lock over opens it


class FairLock:
    """A context manager. Who releases it hands it to the thread that has waited longest.

    With a plain lock, a thread that generates in a loop takes it again before anybody else wakes up.
    """

    def __init__(self) -> None:
        self._mutex = Lock()  # held for moments only, never while waiting
        self._waiting: deque[_Waiting] = deque()
        self._owner: int | None = None
        self._depth = 0

    def __enter__(self) -> None:
        thread = get_ident()
        with self._mutex:
            if self._owner in (None, thread):
                self._owner = thread
                self._depth += 1
                return
            mine = _Waiting(thread, Lock())
            mine.gate.acquire()
            self._waiting.append(mine)
        try:
            mine.gate.acquire()
        except BaseException:
            self._give_up(mine)
            raise

    def try_enter(self) -> bool:
        """Take the lock if nobody has it, this thread included. Never waits, so that a finaliser may ask."""
        if not self._mutex.acquire(blocking=False):
            return False
        is_free = self._owner is None
        if is_free:
            self._owner, self._depth = get_ident(), 1
        self._mutex.release()
        return is_free

    def is_outermost(self) -> bool:
        """Whether this thread has the lock, and took it once."""
        return self._owner == get_ident() and self._depth == 1

    def __exit__(self, *exc_info: object) -> None:
        with self._mutex:
            self._depth -= 1
            if self._depth == 0:
                self._hand_over()

    def _hand_over(self) -> None:
        if not self._waiting:
            self._owner = None
            return
        following = self._waiting.popleft()
        self._owner, self._depth = following.thread, 1
        following.gate.release()

    def _give_up(self, mine: _Waiting) -> None:
        """Leave the queue after an interrupt; the lock may have come meanwhile, and then goes on to the next."""
        with self._mutex:
            if mine in self._waiting:
                self._waiting.remove(mine)
            else:
                self._depth = 0
                self._hand_over()
