"""Foreign configurations as they are found in a file, whatever its format."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from inference_shardformer.config.migrate.fates import ForeignField, Kind
from inference_shardformer.config.migrate.inference_fields import INFERENCE_FIELDS
from inference_shardformer.config.migrate.shard_fields import RETIRED_SHARD_FIELDS, SHARD_FIELDS

INFERENCE = "InferenceConfig"
SHARD = "ShardConfig"
Form = Literal["call", "mapping"]
"""`call`: the constructor, which refused unknown names. `mapping`: what from_dict read, which ignored them."""

POSITIONS: Mapping[str, tuple[ForeignField, ...]] = {INFERENCE: INFERENCE_FIELDS, SHARD: SHARD_FIELDS}
FIELDS: Mapping[str, Mapping[str, ForeignField]] = {
    INFERENCE: {row.name: row for row in INFERENCE_FIELDS},
    SHARD: {row.name: row for row in (*SHARD_FIELDS, *RETIRED_SHARD_FIELDS)},
}
ALL_FIELDS: Mapping[str, ForeignField] = {**FIELDS[INFERENCE], **FIELDS[SHARD]}


class Entry(NamedTuple):
    """One line of a report: what was found under which name, where, what it became, and why."""

    kind: Kind
    name: str
    given: str
    line: int | None
    sentence: str
    settings: Mapping[str, object] = {}


@dataclass
class ForeignSource:
    """One configuration: its class, or none for a plain mapping, and its values by name with the line of each.

    `entries` holds what could not become a value.
    """

    owner: str
    form: Form
    line: int | None
    end_line: int | None = None
    values: dict[str, object] = field(default_factory=dict)
    lines: dict[str, int | None] = field(default_factory=dict)
    entries: list[Entry] = field(default_factory=list)

    @property
    def fields(self) -> Mapping[str, ForeignField]:
        """The fields that it may have."""
        return FIELDS.get(self.owner, ALL_FIELDS)

    @property
    def is_inference(self) -> bool:
        """Whether it configures inference, so that fields it leaves out had ColossalAI's defaults."""
        return self.owner == INFERENCE or (
            self.owner != SHARD and any(name in FIELDS[INFERENCE] for name in self.values)
        )

    def __str__(self) -> str:
        place = f" on line {self.line}" if self.line else ""
        return f"{self.owner or 'settings'}{place}"


def unknown_sentence(source: ForeignSource, name: str) -> str:
    """What an unknown name did there, and the name that it may have meant."""
    near = difflib.get_close_matches(name, source.fields, n=1, cutoff=0.7)
    question = f"; did you mean {near[0]}?" if near else "; remove it"
    if source.form == "call":
        return f"{source.owner} takes no such argument{question}"
    return f"had no effect: ColossalAI's from_dict ignored names that it did not know{question}"
