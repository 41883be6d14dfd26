"""HubBoard: the board of group rank 0, which decides the order of the entries and who is late."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from inference_shardformer.distributed.board import FAILURE, Board, Seat
from inference_shardformer.distributed.records import FailureRecord
from inference_shardformer.distributed.stall import Progress, StallWatch
from inference_shardformer.distributed.wire import Line


class HubBoard(Board):
    """Enters what the ranks post, in order of arrival, and hands it to all of them."""

    def __init__(self, seat: Seat, lines: Mapping[int, Line]) -> None:
        self._watch = StallWatch(size=seat.size, timeout_s=seat.timeout_s)
        super().__init__(seat, lines)

    def _deliver(self, key: str, value: str) -> None:
        if key in self._entries:
            return
        if key.startswith("closed/"):
            self._watch.left(int(key.removeprefix("closed/")))
        for line in self._lines.values():
            line.send("post", key, value)
        self._enter(key, value)

    def _handle(self, sender: int, message: list[Any]) -> None:
        match message:
            case ["post", str(key), str(value)]:
                self._deliver(key, value)
            case ["progress", *fields]:
                self._watch.heard(sender, Progress(*fields))

    def _handle_loss(self, sender: int) -> None:
        self._deliver(f"lost/{sender}", "")
        if f"closed/{sender}" not in self._entries:
            self._fail(FailureRecord.died(sender, self._phase_of_group(sender)))

    def _tick(self, elapsed_s: float) -> None:
        for line in self._lines.values():
            line.send("alive")
        self._watch.heard(0, self.seat.progress())
        late = self._watch.tick(elapsed_s)
        if late is None or FAILURE in self._entries:
            return
        phase = self._watch.phase_of(late) if self._watch.is_heard(late) else self._phase_of_group(late)
        if f"closed/{late}" in self._entries:
            self._fail(FailureRecord.left(late, phase))
        else:
            self._fail(FailureRecord.stalled(late, phase, timeout_s=self.seat.timeout_s))

    def _phase_of_group(self, rank: int) -> str:
        """What a rank was doing that cannot be asked any more: the same as this one, when this one is in a step."""
        own = self.seat.progress()
        return own.phase if own.is_waiting else self._watch.phase_of(rank)

    def _fail(self, record: FailureRecord) -> None:
        self._deliver(FAILURE, record.to_json())
