"""Origin: where a configuration value came from. Levels order the sources, lowest first."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum


class Level(IntEnum):
    """Precedence of a source; a higher level beats a lower one.

    `UPDATE` is a change of a live field while the engine runs, `REQUEST` what one request brings for itself.
    """

    DEFAULT = 0
    PRESET = 10
    FILE = 20
    ENVIRONMENT = 30
    CLI = 40
    CALL = 50
    UPDATE = 55
    REQUEST = 60


@dataclass(frozen=True)
class Origin:
    """One source: its level, and the place in it (`run.yaml:3`, a variable, a flag). Reads well as text."""

    level: Level
    where: str = ""

    def __str__(self) -> str:
        return f"{_WORDS[self.level]} {self.where}".strip()


DEFAULT = Origin(Level.DEFAULT)

_WORDS = {
    Level.DEFAULT: "default",
    Level.PRESET: "preset",
    Level.FILE: "file",
    Level.ENVIRONMENT: "variable",
    Level.CLI: "option",
    Level.CALL: "call argument",
    Level.UPDATE: "update",
    Level.REQUEST: "request",
}
