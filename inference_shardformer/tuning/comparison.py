"""Comparison: what measuring the backends of one model gave, the same on every rank; how it becomes a profile."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from inference_shardformer.tuning.choice import choose, praise, standings
from inference_shardformer.tuning.errors import TuningProfileError
from inference_shardformer.tuning.measurement import Measurement
from inference_shardformer.tuning.profile import TuningEntry, TuningProfile, is_profile

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Comparison:
    """Rows of all ranks together, for layers with equal needs.

    `keys` are those of every rank's spec, `refused` the backends that cannot serve.
    """

    of: str
    layers: tuple[int, ...]
    device: str
    num_ranks: int
    rounds: int
    keys: tuple[str, ...]
    rows: tuple[Measurement, ...]
    refused: Mapping[str, str]
    fingerprint: Mapping[str, str]

    @property
    def choice(self) -> str | None:
        """The backend to take; `None` if none is right everywhere."""
        ranked = standings(self.rows)
        return ranked[0].backend if ranked else None

    @property
    def why(self) -> str:
        """What speaks for the choice; empty without one."""
        return praise(self.rows, self.choice) if self.choice else ""

    def fastest(self) -> frozenset[int]:
        """Places of the rows that are the fastest valid ones of their bucket."""
        best: dict[object, int] = {}
        for place, row in enumerate(self.rows):
            if row.is_valid and (row.bucket not in best or _seconds(row) < _seconds(self.rows[best[row.bucket]])):
                best[row.bucket] = place
        return frozenset(best.values())

    def to_json(self) -> dict[str, object]:
        """A stable object for programs."""
        fastest = self.fastest()
        return {
            "schema_version": SCHEMA_VERSION,
            "of": self.of,
            "layers": list(self.layers),
            "device": self.device,
            "num_ranks": self.num_ranks,
            "rounds": self.rounds,
            "specs": list(self.keys),
            "rows": [row.to_object() | {"is_fastest": place in fastest} for place, row in enumerate(self.rows)],
            "standings": [standing._asdict() for standing in standings(self.rows)],
            "choice": self.choice,
            "why": self.why,
            "refused": dict(self.refused),
            "fingerprint": dict(self.fingerprint),
        }

    def save(self, path: str | Path) -> None:
        """Write a profile, or add to one that was has the same fingerprint; a stale or edited one is replaced.

        Raises `BackendUnavailableError` if there is no choice, `TuningProfileError` if the file is something else.
        """
        entry = TuningEntry(choose(self.rows), self.rows)
        entries = {**_kept(Path(path), self.fingerprint), **dict.fromkeys(self.keys, entry)}
        TuningProfile(dict(self.fingerprint), entries).save(path)


def check_target(path: str | Path) -> None:
    """Raise `TuningProfileError` if a profile cannot go there, before anything is measured."""
    target = Path(path)
    if not target.absolute().parent.is_dir():
        raise TuningProfileError(f"{path}: its folder does not exist", remedy="make it first, or name another file")
    if target.exists() and not is_profile(target):
        raise TuningProfileError(
            f"{path} exists and is no tuning profile, so it is not overwritten",
            remedy="name another file, or remove it",
        )


def _kept(path: Path, fingerprint: Mapping[str, str]) -> dict[str, TuningEntry]:
    """The entries of an older profile that hold as well."""
    check_target(path)
    if not path.exists():
        return {}
    try:
        older = TuningProfile.load(path)
        older.check(path, fingerprint)
    except TuningProfileError:
        return {}
    return dict(older.entries)


def _seconds(row: Measurement) -> float:
    return float("inf") if row.seconds is None else row.seconds
