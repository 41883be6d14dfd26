"""Board: what the ranks of a group have announced, kept alike on every rank by a background thread.

    rank 1 ──post──▶ ┌────────────────┐ ──entries──▶ rank 1
    rank 2 ──post──▶ │ hub, on rank 0 │ ──entries──▶ rank 2      an entry is written once: the first post of a key wins,
    rank 0 ──post──▶ └────────────────┘ ──entries──▶ rank 0      and what the hub enters, every rank sees

Beside the entries, members send the hub their progress and the hub sends a sign of life. A connection that ends tells
of a process that ended; progress that halts while others wait tells of a stall.
"""

from __future__ import annotations

import selectors
import socket
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from inference_shardformer.distributed.records import FailureRecord
from inference_shardformer.distributed.stall import Progress
from inference_shardformer.distributed.wire import Line

FAILURE = "failure"
TICK_S = 0.25


@dataclass(frozen=True)
class Seat:
    """A rank's place at the board: who it is, how to read its progress, and what to do once the group has failed."""

    rank: int
    size: int
    timeout_s: float
    progress: Callable[[], Progress]
    on_failure: Callable[[], None]


class Board(ABC):
    """Entries that all ranks share. Any thread may post, read and wait; one thread of ours does the talking."""

    def __init__(self, seat: Seat, lines: Mapping[int, Line]) -> None:
        self.seat = seat
        self._lines = dict(lines)
        self._entries: dict[str, str] = {}
        self._changed = threading.Condition()
        self._outbox: deque[tuple[str, str]] = deque()
        self._wake, self._woken = socket.socketpair()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name=f"rank-board-{seat.rank}", daemon=True)
        self._thread.start()

    @property
    def failure(self) -> FailureRecord | None:
        """Why the group has ended, if it has."""
        text = self._entries.get(FAILURE)
        return None if text is None else FailureRecord.from_json(text)

    def post(self, key: str, value: str) -> None:
        """Announce something. An entry that exists already is kept."""
        self._outbox.append((key, value))
        self._wake.send(b"x")

    def wait(self, condition: Callable[[Mapping[str, str]], bool], *, timeout_s: float | None = None) -> bool:
        """Wait until the entries meet the condition; says whether they do."""
        with self._changed:
            return self._changed.wait_for(lambda: condition(self._entries), timeout_s)

    def take(self, keys: list[str]) -> list[str] | None:
        """Remove entries and return them; `None` when one of them is missing."""
        with self._changed:
            if not all(key in self._entries for key in keys):
                return None
            return [self._entries.pop(key) for key in keys]

    def close(self) -> None:
        """Stop the thread and hang up. Entries stay readable."""
        self._stopping = True
        self._wake.send(b"x")
        self._thread.join(timeout=5.0)
        for line in self._lines.values():
            line.close()
        self._wake.close()
        self._woken.close()

    @abstractmethod
    def _deliver(self, key: str, value: str) -> None:
        """Handle a post of this rank."""

    @abstractmethod
    def _handle(self, sender: int, message: list[Any]) -> None:
        """Handle a message of another rank."""

    @abstractmethod
    def _handle_loss(self, sender: int) -> None:
        """A connection has ended."""

    @abstractmethod
    def _tick(self, elapsed_s: float) -> None:
        """Called a few times a second."""

    def _enter(self, key: str, value: str) -> None:
        """Write an entry unless it exists."""
        with self._changed:
            if key in self._entries:
                return
            self._entries[key] = value
            self._changed.notify_all()
        if key == FAILURE:
            self.seat.on_failure()
            self._deliver(f"seen/{self.seat.rank}", "")

    def _run(self) -> None:
        try:
            self._talk()
        finally:
            if not self._stopping:
                lost = FailureRecord(self.seat.rank, "watching the other ranks", "its watching thread ended")
                self._enter(FAILURE, lost.to_json())

    def _talk(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._woken, selectors.EVENT_READ)
            for rank, line in self._lines.items():
                selector.register(line, selectors.EVENT_READ, rank)
            last = time.monotonic()
            while not self._stopping:
                for ready, _ in selector.select(max(0.0, last + TICK_S - time.monotonic())):
                    if ready.data is None:
                        self._woken.recv(4096)
                    elif not self._read(ready.data):
                        selector.unregister(ready.fileobj)
                        self._handle_loss(ready.data)
                while self._outbox:
                    self._deliver(*self._outbox.popleft())
                now = time.monotonic()
                if now - last >= TICK_S:
                    self._tick(now - last)
                    last = now

    def _read(self, rank: int) -> bool:
        messages = self._lines[rank].receive()
        for message in messages or ():
            self._handle(rank, message)
        return messages is not None
