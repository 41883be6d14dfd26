"""What a draft is made of: rows with a confidence and a reason, and open questions that make the policy refuse."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Confidence = Literal["certain", "likely", "guess"]


@dataclass(frozen=True)
class DraftRow:
    """One row of the drafted table: the call that makes it, and why. `function` is a name of the policy modules."""

    function: str
    pattern: str
    confidence: Confidence
    reason: str
    arguments: tuple[tuple[str, str], ...] = ()  # keyword and Python source of its value

    def source(self) -> str:
        """The row as a Python expression."""
        keywords = "".join(f", {name}={value}" for name, value in self.arguments)
        return f'{self.function}("{self.pattern}"{keywords})'


@dataclass(frozen=True)
class DraftFacts:
    """What `facts()` of the drafted policy passes beside the configuration; Python source of the values."""

    intermediate_size: str = "intermediate_size"
    sliding_windows: str = "no_windows(hf_config)"
    attention_scale: str | None = None
    attention_softcap: str | None = None


@dataclass(frozen=True)
class DraftTable:
    """Everything that could be read from one model, and what could not."""

    architecture: str
    rows: tuple[DraftRow, ...]
    facts: DraftFacts
    undecided: tuple[str, ...]
