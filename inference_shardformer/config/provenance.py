"""Provenance of configurations made by a call: which of their fields the caller gave."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import BaseModel

from inference_shardformer.config.inference import InferenceConfig
from inference_shardformer.config.origins import Level, Origin
from inference_shardformer.config.shard import ShardConfig


def call_provenance(shard: ShardConfig, inference: InferenceConfig) -> dict[str, Origin]:
    """The origin of every field that was given to the constructors, by full path; defaults are left out."""
    origin = Origin(Level.CALL)
    return {
        path: origin for model, root in ((shard, "shard"), (inference, "inference")) for path in _given(model, root)
    }


def _given(model: BaseModel, prefix: str) -> Iterator[str]:
    """Full paths of the fields that were given to `model` and to the groups below it."""
    for name in type(model).model_fields:
        value = getattr(model, name)
        if name in model.model_fields_set:
            path = f"{prefix}.{name}"
            yield from _given(value, path) if isinstance(value, BaseModel) else (path,)
