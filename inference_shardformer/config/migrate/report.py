"""The report of one migration: text for people, one stable object for programs."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass

from inference_shardformer.config.migrate.fates import FAILURES, Kind
from inference_shardformer.config.migrate.schema import SCHEMA_VERSION
from inference_shardformer.config.migrate.sources import Entry
from inference_shardformer.config.violations import show

_TITLES: Mapping[Kind, str] = {
    "upgraded": "upgraded to the current schema",
    "same": "carried under the same name",
    "renamed": "renamed",
    "changed": "changed in meaning",
    "dropped": "dropped, without effect on the results",
    "refused": "refused",
    "unknown": "unknown",
    "undecided": "undecided: known only when the program runs",
}


@dataclass(frozen=True)
class Migration:
    """What became of one file. `origin` says what it held; `text` is the new file, in the format of `suffix`.

    `version` is the version of our schema that the file had, `None` for ColossalAI's configuration.
    """

    name: str
    origin: str
    version: int | None
    tree: Mapping[object, object]
    entries: tuple[Entry, ...]
    text: str

    @property
    def is_complete(self) -> bool:
        """Whether everything that had an effect was carried."""
        return not any(entry.kind in FAILURES for entry in self.entries)

    def as_text(self) -> str:
        """The entries by kind, aligned; `nothing to migrate` without any."""
        if not self.entries:
            return f"{self.name}: {self.origin}; nothing to migrate"
        blocks = [f"{self.name}: {self.origin}"]
        for kind, title in _TITLES.items():
            chosen = [entry for entry in self.entries if entry.kind == kind]
            if chosen:
                blocks += ["", f"{title} ({len(chosen)})", *(_lines_of(entry) for entry in chosen)]
        return "\n".join(blocks)

    def as_object(self, *, written: str | None = None) -> dict[str, object]:
        """The migration as programs read it; `written` is the file that now holds it."""
        entries: dict[str, object] = {
            kind: [_object_of(entry) for entry in self.entries if entry.kind == kind] for kind in _TITLES
        }
        return {
            "file": self.name,
            "origin": self.origin,
            "from_version": self.version,
            "schema_version": SCHEMA_VERSION,
            "complete": self.is_complete,
            "written": written,
            "config": self.tree,
            **entries,
        }


def _lines_of(entry: Entry) -> str:
    """An entry: where and what was given, what it became, and why."""
    place = f"line {entry.line}" if entry.line else ""
    indent = " " * 14
    became = [f"{indent}-> {path} = {show(value)}" for path, value in entry.settings.items()]
    why = textwrap.fill(entry.sentence, width=116, initial_indent=indent, subsequent_indent=indent)
    return "\n".join([f"  {place:<11} {entry.given}".rstrip(), *became, why])


def _object_of(entry: Entry) -> dict[str, object]:
    return {
        "name": entry.name,
        "given": entry.given,
        "line": entry.line,
        "becomes": dict(entry.settings),
        "reason": entry.sentence,
    }
