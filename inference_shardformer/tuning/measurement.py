"""Measurement: one backend on one bucket, and how the rows of several ranks become one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from pydantic import ConfigDict, TypeAdapter, ValidationError

from inference_shardformer.tuning.buckets import Bucket, Phase


@dataclass(frozen=True)
class Measurement:
    """One row. `seconds` is the median of one layer's step; `None` if the backend was not timed.

    `max_error` is the largest absolute difference from the reference kernels; `None` if there was nothing to compare.
    A row with a `problem` is disqualified, however fast it is.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    phase: Phase
    batch: int
    length: int
    backend: str
    seconds: float | None = None
    max_error: float | None = None
    problem: str = ""

    @property
    def bucket(self) -> Bucket:
        """The cell of the grid."""
        return Bucket(self.phase, self.batch, self.length)

    @property
    def is_valid(self) -> bool:
        """Whether the backend was right here, and timed."""
        return not self.problem and self.seconds is not None

    @property
    def verdict(self) -> str:
        """`ok` or `disqualified`."""
        return "ok" if self.is_valid else "disqualified"

    @property
    def tokens_per_second(self) -> float | None:
        """Query tokens per second through one layer."""
        return None if not self.seconds else self.bucket.num_tokens / self.seconds

    def to_object(self) -> dict[str, object]:
        """A stable object for programs."""
        row = {"tokens_per_second": self.tokens_per_second, "verdict": self.verdict}
        return {name: None if value == float("inf") else value for name, value in (asdict(self) | row).items()}


_ROWS = TypeAdapter(tuple[Measurement, ...])


def rows_to_bytes(rows: Sequence[Measurement]) -> bytes:
    """Rows as JSON, to send or to keep; an infinite error becomes none."""
    return json.dumps([asdict(_finite(row)) for row in rows], allow_nan=False).encode()


def rows_from_bytes(data: bytes) -> tuple[Measurement, ...]:
    """What `rows_to_bytes` wrote. Raises `ValueError` for anything else."""
    try:
        return _ROWS.validate_json(data)
    except ValidationError as exc:
        first = exc.errors(include_url=False)[0]
        raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from exc


def slowest_of(ranks: Sequence[Sequence[Measurement]]) -> tuple[Measurement, ...]:
    """One row for each bucket and backend: the slowest rank's time, the largest error, the first rank's problem.

    A step ends when its slowest rank does. A backend without a row on some rank is disqualified. The same on every
    rank, because it is a function of all ranks' rows in their order.
    """
    tables = [{(row.bucket, row.backend): row for row in rows} for rows in ranks]
    keys = dict.fromkeys(key for table in tables for key in table)
    return tuple(_together(bucket, backend, tables) for bucket, backend in keys)


def _together(bucket: Bucket, backend: str, tables: Sequence[dict[tuple[Bucket, str], Measurement]]) -> Measurement:
    absent = Measurement(*bucket, backend, problem="cannot serve there")
    rows = [table.get((bucket, backend), absent) for table in tables]
    if len(rows) == 1:
        return rows[0]
    times = [row.seconds for row in rows]
    errors = [row.max_error for row in rows if row.max_error is not None]
    return Measurement(
        *bucket,
        backend,
        seconds=None if None in times else max(seconds for seconds in times if seconds is not None),
        max_error=max(errors, default=None),
        problem=next((f"rank {rank}: {row.problem}" for rank, row in enumerate(rows) if row.problem), ""),
    )


def _finite(row: Measurement) -> Measurement:
    return replace(row, max_error=None) if row.max_error == float("inf") else row
