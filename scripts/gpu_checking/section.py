"""Section: a part of the check with its rows; Budget: how much time is left for the others."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple


class Row(NamedTuple):
    """One line of the report. `is_right` is None where nothing could be wrong, such as a mere time."""

    name: str
    value: str
    is_right: bool | None = None
    data: dict[str, object] = {}  # noqa: RUF012 - a default of a NamedTuple, never changed


class Budget:
    """Seconds from its making on; a section that would begin after them is left out."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._end = clock() + seconds

    @property
    def left(self) -> float:
        """Seconds left, below 0 once it is spent."""
        return self._end - self._clock()


@dataclass
class Section:
    """Rows under a heading. `problem` is why they are not all there."""

    name: str
    rows: list[Row] = field(default_factory=list)
    seconds: float = 0.0
    problem: str = ""

    @property
    def is_right(self) -> bool:
        """Whether nothing in it was wrong or left out by a failure."""
        return not self.problem.startswith("failed") and all(row.is_right is not False for row in self.rows)

    def to_json(self) -> dict[str, object]:
        """A plain object."""
        rows = [{"name": row.name, "value": row.value, "is_right": row.is_right, **row.data} for row in self.rows]
        return {"section": self.name, "seconds": round(self.seconds, 1), "problem": self.problem, "rows": rows}


def run_section(name: str, rows: Callable[[], Iterable[Row]], budget: Budget, *, needs_s: float = 10.0) -> Section:
    """Run one section; a failure in it is reported with the rows that it had, and ends nothing else."""
    section = Section(name)
    if budget.left < needs_s:
        section.problem = f"left out: it needs about {needs_s:.0f} s, {max(budget.left, 0):.0f} s are left"
        return section
    started = time.monotonic()
    try:
        for row in rows():
            section.rows.append(row)
    except Exception as exc:  # noqa: BLE001 - one failing part must not keep the rest from being known
        where = traceback.extract_tb(exc.__traceback__)[-1]
        section.problem = f"failed: {type(exc).__name__}: {exc} ({where.filename}:{where.lineno})"
    section.seconds = time.monotonic() - started
    return section


def as_table(sections: Iterable[Section]) -> str:
    """All sections as aligned text."""
    lines: list[str] = []
    for section in sections:
        lines.append(f"{section.name} ({section.seconds:.0f} s)")
        width = max((len(row.name) for row in section.rows), default=0)
        marks = {True: "ok  ", False: "BAD ", None: "    "}
        lines += [f"  {marks[row.is_right]}{row.name:{width}}  {row.value}" for row in section.rows]
        lines += [f"  {section.problem}"] if section.problem else []
    return "\n".join(lines)
