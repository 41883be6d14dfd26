"""The JSON of a plan file: what it must hold, and its text in a stable order with one parameter on each line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from inference_shardformer.errors import PlanFileError

FORMAT: Literal["inference-shardformer sharding plan"] = "inference-shardformer sharding plan"
PLAN_SCHEMA_VERSION: Literal[1] = 1
REMAKE = "make it again with `inference-shardformer plan --out`"
_ONE_PER_LINE = ("model", "replaced", "modules", "tensors", "parameters")


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class RankPart(_Strict):
    """One parameter on one rank: its shape, and `(tensor, dim, start, stop, offset)` of each slice."""

    shape: tuple[int, ...]
    slices: tuple[tuple[str, int, int, int, int], ...]


class ParameterEntry(_Strict):
    """One parameter on all ranks, and the module it belongs to."""

    module: str
    ranks: tuple[RankPart, ...]


class PlanDocument(_Strict):
    """Everything in a plan file, in the order of its text."""

    format: Literal["inference-shardformer sharding plan"] = FORMAT
    schema_version: Literal[1] = PLAN_SCHEMA_VERSION
    fingerprint: str
    policy: str
    tp_size: int
    vocab_ranges: tuple[tuple[int, int], ...]  # of each rank
    model: dict[str, int | str | bool]  # facts
    replaced: dict[str, str]  # path to row
    modules: dict[str, tuple[str, str, str | None]]  # path to row, style, owner of a tied weight
    tensors: dict[str, tuple[int, ...]]  # name to shape, in the checkpoint
    parameters: dict[str, ParameterEntry]

    def to_text(self) -> str:
        """JSON in which the entries of every long part have a line each."""
        content = self.model_dump(mode="json")
        parts = [
            _section(key, value) if key in _ONE_PER_LINE else f"{_json(key)}: {_json(value)}"
            for key, value in content.items()
        ]
        return "{\n" + ",\n".join(f"  {part}" for part in parts) + "\n}\n"


def parse_document(text: str, name: str) -> PlanDocument:
    """The document of a text. Raises `PlanFileError` for what is no plan, has another version, or lost its shape."""
    try:
        content = json.loads(text)
    except ValueError as exc:
        raise PlanFileError(f"{name}: is not JSON: {exc}", remedy=REMAKE) from exc
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise PlanFileError(f"{name}: is not a plan: its format is not {FORMAT!r}", remedy=REMAKE)
    version = content.get("schema_version")
    if version != PLAN_SCHEMA_VERSION:
        raise PlanFileError(
            f"{name}: has schema_version {version!r}; this version reads {PLAN_SCHEMA_VERSION}", remedy=REMAKE
        )
    try:
        return PlanDocument.model_validate_json(text)
    except ValidationError as exc:
        problems = [f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in exc.errors(include_url=False)]
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise PlanFileError(f"{name}: {'; '.join(problems[:3])}{more}", remedy=REMAKE) from exc


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _section(key: str, rows: Mapping[str, object]) -> str:
    if not rows:
        return f"{_json(key)}: {{}}"
    lines = [f"    {_json(name)}: {_json(value)}" for name, value in rows.items()]
    return f"{_json(key)}: {{\n" + ",\n".join(lines) + "\n  }"
