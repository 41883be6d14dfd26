"""LayerVerdicts: how the backend of one group of layers was chosen on one rank, as plain values to send and to show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from pydantic import TypeAdapter

from inference_shardformer.attention.groups import LayerGroups
from inference_shardformer.attention.selector import Selection


@dataclass(frozen=True)
class LayerVerdicts:
    """Layers of one rank that share a spec: the spec as text by name and in words, and every candidate's verdict."""

    layers: tuple[int, ...]
    spec: Mapping[str, str]
    needs: str
    selection: Selection


def verdicts_of(groups: LayerGroups, selections: Sequence[Selection]) -> tuple[LayerVerdicts, ...]:
    """The verdicts of this rank, one entry for each group of layers."""
    return tuple(
        LayerVerdicts(groups.layers(group), spec.facts(), spec.in_words(), selection)
        for group, (spec, selection) in enumerate(zip(groups.specs, selections, strict=True))
    )


def to_bytes(verdicts: Sequence[LayerVerdicts]) -> bytes:
    """JSON, to send to other ranks."""
    return _adapter().dump_json(tuple(verdicts))


def from_bytes(data: bytes) -> tuple[LayerVerdicts, ...]:
    """What `to_bytes` wrote. Raises `ValueError` for anything else."""
    return _adapter().validate_json(data)


@cache
def _adapter() -> TypeAdapter[tuple[LayerVerdicts, ...]]:
    return TypeAdapter(tuple[LayerVerdicts, ...])
