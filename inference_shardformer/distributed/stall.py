"""StallWatch: which rank the others have been waiting for too long. Plain arithmetic, no clock and no threads."""

from __future__ import annotations

from typing import NamedTuple

# A tick never counts for more than this, so that a machine that was suspended does not find its peers late on waking.
_LONGEST_TICK_S = 1.0
_GRACE_OF_A_RANK_THAT_LEFT_S = 2.0
_SILENCE_S = 1.0


class Progress(NamedTuple):
    """Where a rank stands. All ranks walk through the same positions."""

    num_phases: int  # steps and phases entered or finished so far
    num_collectives: int  # collectives entered so far
    is_waiting: bool  # whether this rank cannot go on without the others
    patience_s: float  # seconds it grants them beyond the timeout
    phase: str  # what it does, in words

    @property
    def position(self) -> tuple[int, int]:
        """Comparable between ranks: the lower one is behind."""
        return self.num_phases, self.num_collectives


class StallWatch:
    """Collects the progress of every rank and names the one that is late."""

    def __init__(self, *, size: int, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._progress = [Progress(0, 0, False, 0.0, "start") for _ in range(size)]
        self._unchanged_s = [0.0] * size
        self._silent_s = [0.0] * size
        self._left: set[int] = set()

    def heard(self, rank: int, progress: Progress) -> None:
        """Take note of a rank's latest progress."""
        self._silent_s[rank] = 0.0
        if progress != self._progress[rank]:
            self._progress[rank] = progress
            self._unchanged_s[rank] = 0.0

    def phase_of(self, rank: int) -> str:
        """What the rank did when it was last heard."""
        return self._progress[rank].phase

    def is_heard(self, rank: int) -> bool:
        """Whether the rank still reports, stalled or not."""
        return self._silent_s[rank] <= _SILENCE_S

    def left(self, rank: int) -> None:
        """The rank will not take part any more: whoever waits for it waits in vain."""
        self._left.add(rank)

    def tick(self, elapsed_s: float) -> int | None:
        """Let time pass; returns the rank that others have waited for too long, if there is one."""
        for rank in range(len(self._unchanged_s)):
            self._unchanged_s[rank] += min(elapsed_s, _LONGEST_TICK_S)
            self._silent_s[rank] += min(elapsed_s, _LONGEST_TICK_S)
        last = min(range(len(self._progress)), key=lambda rank: self._progress[rank].position)
        waited_s = max(
            (
                unchanged_s - progress.patience_s
                for progress, unchanged_s in zip(self._progress, self._unchanged_s, strict=True)
                if progress.is_waiting and progress.position > self._progress[last].position
            ),
            default=0.0,
        )
        limit_s = _GRACE_OF_A_RANK_THAT_LEFT_S if last in self._left else self._timeout_s
        return last if waited_s >= limit_s else None
