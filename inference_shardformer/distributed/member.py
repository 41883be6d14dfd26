"""MemberBoard: the board of every rank but group rank 0. It decides nothing but that rank 0 itself is gone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from inference_shardformer.distributed.board import FAILURE, TICK_S, Board, Seat
from inference_shardformer.distributed.records import FailureRecord
from inference_shardformer.distributed.wire import Line


class MemberBoard(Board):
    """Hands posts to the hub and enters what comes back. Without a hub, all members conclude the same by themselves."""

    def __init__(self, seat: Seat, lines: Mapping[int, Line]) -> None:
        self._silent_s = 0.0
        self._hub_is_lost = False
        super().__init__(seat, lines)

    def _deliver(self, key: str, value: str) -> None:
        self._lines[0].send("post", key, value)
        if self._hub_is_lost:
            self._enter(key, value)

    def _handle(self, sender: int, message: list[Any]) -> None:
        self._silent_s = 0.0
        match message:
            case ["post", str(key), str(value)]:
                self._enter(key, value)

    def _handle_loss(self, sender: int) -> None:
        phase = self.seat.progress().phase
        left = "closed/0" in self._entries
        self._lose_hub(FailureRecord.left(0, phase) if left else FailureRecord.died(0, phase))

    def _tick(self, elapsed_s: float) -> None:
        if self._hub_is_lost:
            return
        progress = self.seat.progress()
        self._lines[0].send("progress", *progress)
        self._silent_s += min(elapsed_s, 1.0)
        if progress.is_waiting and self._silent_s > self.seat.timeout_s + progress.patience_s + 2 * TICK_S:
            self._lose_hub(FailureRecord.stalled(0, progress.phase, timeout_s=self.seat.timeout_s))

    def _lose_hub(self, record: FailureRecord) -> None:
        self._hub_is_lost = True
        self._enter("lost/0", "")
        if f"closed/{self.seat.rank}" not in self._entries:
            self._deliver(FAILURE, record.to_json())
