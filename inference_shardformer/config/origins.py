"""Origin: where a configuration value came from. Levels order the sources, lowest first."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum


class Level(IntEnum):
    """Precedence of a source; a higher level beats a lower one."""

    DEFAULT = 0
    FILE = 20
    ENVIRONMENT = 30
    CLI = 40
    CALL = 50


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
    Level.FILE: "file",
    Level.ENVIRONMENT: "variable",
    Level.CLI: "option",
    Level.CALL: "call argument",
}
