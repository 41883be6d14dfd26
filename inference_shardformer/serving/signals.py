"""StopSignals: the signals that ask a server to stop, as events of its event loop."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

HANDLED = (signal.SIGINT, signal.SIGTERM)


class StopSignals:
    """`first` is the signal that came first, if one did; `asked` is set by it, `urged` by the next one."""

    def __init__(self) -> None:
        self.first: signal.Signals | None = None
        self.asked = asyncio.Event()
        self.urged = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Catch them for a while; for the main thread of a process.

        Handlers of Python's own kind, not those of the event loop: these would take the wake-up file descriptor away
        from whoever watches a rank.
        """
        before = {number: signal.signal(number, self._handle) for number in HANDLED}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._loop.call_soon_threadsafe(self._note, signal.Signals(number))

    def _note(self, number: signal.Signals) -> None:
        if self.first is None:
            self.first = number
            self.asked.set()
        else:
            self.urged.set()


@contextmanager
def ignored() -> Iterator[None]:
    """Ignore them: a rank that follows another ends when that one says so, or fails."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in HANDLED}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
