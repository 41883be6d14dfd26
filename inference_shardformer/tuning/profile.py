"""TuningProfile: measurements and choices in a file, with what they hold for and a checksum over all of it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from inference_shardformer.tuning.errors import TuningProfileError
from inference_shardformer.tuning.fingerprint import Fingerprint, differences
from inference_shardformer.tuning.measurement import Measurement, rows_from_bytes, rows_to_bytes

SCHEMA_VERSION = 1
_KIND = "inference-shardformer tuning profile"
_FIELDS = {"kind", "schema_version", "fingerprint", "entries", "checksum"}


@dataclass(frozen=True)
class TuningEntry:
    """What was measured for one spec, and the backend that follows from it."""

    choice: str
    measurements: tuple[Measurement, ...]


@dataclass(frozen=True)
class TuningProfile:
    """Entries by the key of their spec; all of them hold for one fingerprint."""

    fingerprint: Fingerprint
    entries: Mapping[str, TuningEntry] = field(default_factory=dict)

    @classmethod
    def load(cls, path: str | Path) -> TuningProfile:
        """Read a profile. Raises `TuningProfileError` if it is unreadable, of another schema, or was edited."""
        document = _document(Path(path))
        if document.get("schema_version") != SCHEMA_VERSION:
            given = document.get("schema_version")
            raise _refusal(path, f"it has schema_version {given!r}, this version reads {SCHEMA_VERSION}")
        if document.get("checksum") != _checksum(document):
            raise _refusal(path, "its checksum does not fit its content, so it was edited or cut off")
        if set(document) != _FIELDS:
            raise _refusal(path, f"it has the fields {', '.join(sorted(document))}")
        try:
            return cls(_texts(document["fingerprint"]), _entries(document["entries"]))
        except (KeyError, TypeError, ValueError, AttributeError) as exc:
            raise _refusal(path, f"its content is malformed: {exc}") from exc

    def check(self, path: str | Path, present: Fingerprint) -> None:
        """Raise `TuningProfileError` naming everything that is not as it was when this was measured."""
        stale = differences(self.fingerprint, present)
        if stale:
            raise _refusal(path, "\n  ".join(["it is stale", *stale]))

    def entry(self, path: str | Path, key: str) -> TuningEntry:
        """What was measured for a spec. Raises `TuningProfileError` naming the specs that there are."""
        if key not in self.entries:
            known = "\n  ".join(["", *self.entries])
            raise _refusal(path, f"nothing was measured for {key}; it holds{known or ' nothing'}")
        return self.entries[key]

    def save(self, path: str | Path) -> None:
        """Write the file as a whole; readers see the old content or the new one."""
        document: dict[str, object] = {
            "kind": _KIND,
            "schema_version": SCHEMA_VERSION,
            "fingerprint": dict(self.fingerprint),
            "entries": {
                key: {"choice": entry.choice, "measurements": json.loads(rows_to_bytes(entry.measurements))}
                for key, entry in self.entries.items()
            },
        }
        document["checksum"] = _checksum(document)
        draft = Path(f"{path}.{os.getpid()}.tmp")
        try:
            draft.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
            draft.replace(path)
        except OSError as exc:
            draft.unlink(missing_ok=True)
            raise TuningProfileError(f"{path}: cannot be written: {exc}", remedy="give a file you may write") from exc


def remedy_for(path: str | Path) -> str:
    """The command that makes a profile which holds."""
    command = f"inference-shardformer bench backends --model MODEL --save {path}"
    return f"measure again, with the settings of the run: `{command}`"


def is_profile(path: Path) -> bool:
    """Whether a file is a profile, be it stale, edited, or of another schema."""
    try:
        return _document(path).get("kind") == _KIND
    except TuningProfileError:
        return False


def _document(path: Path) -> dict[str, object]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise _refusal(path, f"it cannot be read: {exc.strerror or exc}") from exc
    except ValueError as exc:
        raise _refusal(path, f"it is not JSON: {exc}") from exc
    if not isinstance(document, dict) or document.get("kind") != _KIND:
        raise _refusal(path, f"it is no {_KIND}")
    return document


def _refusal(path: str | Path, problem: str) -> TuningProfileError:
    return TuningProfileError(f"attention.profile {path} is refused: {problem}", remedy=remedy_for(path))


def _checksum(document: Mapping[str, object]) -> str:
    content = {name: value for name, value in document.items() if name != "checksum"}
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return f"sha256:{hashlib.sha256(canonical.encode()).hexdigest()}"


def _texts(found: object) -> dict[str, str]:
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise ValueError("the fingerprint is not a table of texts")
    return found


def _entries(found: object) -> dict[str, TuningEntry]:
    if not isinstance(found, dict):
        raise ValueError("the entries are not a table")
    return {
        key: TuningEntry(str(entry["choice"]), rows_from_bytes(json.dumps(entry["measurements"]).encode()))
        for key, entry in found.items()
    }
