"""The call level: which fields of the two configurations the caller gave."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from pydantic import BaseModel

from inference_shardformer.config.inference import InferenceConfig
from inference_shardformer.config.layers import Assignment, flatten
from inference_shardformer.config.origins import Level, Origin
from inference_shardformer.config.shard import ShardConfig


def call_assignments(shard: ShardConfig, inference: InferenceConfig) -> Iterator[Assignment]:
    """Every field that was given to the constructors; defaults are left out."""
    for model, root in ((shard, "shard"), (inference, "inference")):
        yield from _given(model, root)


def _given(model: BaseModel, prefix: str) -> Iterator[Assignment]:
    """The fields that were given to `model` and to the groups below it."""
    origin = Origin(Level.CALL)
    for name in type(model).model_fields:
        if name not in model.model_fields_set:
            continue
        path, value = f"{prefix}.{name}", getattr(model, name)
        if isinstance(value, BaseModel):
            yield from _given(value, path)
        elif isinstance(value, Mapping):  # the options of plug-ins
            yield from flatten(value, lambda _: origin, [], prefix=path)
        else:
            yield Assignment(path, value, origin)
