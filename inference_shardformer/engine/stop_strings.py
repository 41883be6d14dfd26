"""StopStrings: ends a text before the first of several stop texts, wherever the pieces were cut."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Takes text in pieces and releases what cannot be part of a stop text any more."""

    def __init__(self, stop: Sequence[str]) -> None:
        self.matched: str | None = None
        self._stop = tuple(stop)
        self._held = ""

    def push(self, text: str, *, is_last: bool = False) -> str:
        """The text that may be shown now. After a match nothing more is released; `is_last` releases what is held."""
        if self.matched is not None:
            return ""
        text = self._held + text
        found = min(((text.find(stop), stop) for stop in self._stop if stop in text), default=None)
        if found is not None:
            position, self.matched = found
            self._held = ""
            return text[:position]
        num_held = 0 if is_last else max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]


def _overlap(text: str, stop: str) -> int:
    """How many of the last characters of `text` begin `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((length for length in range(longest, 0, -1) if text.endswith(stop[:length])), 0)
