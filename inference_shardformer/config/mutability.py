"""Mutability: which fields may change while an engine runs, declared on the fields themselves.

A field says so with `Field(json_schema_extra={"mutability": ...})`; one that says nothing is `init_only`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Literal, cast, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from inference_shardformer.config.fields import ROOTS, all_fields
from inference_shardformer.errors import ConfigError

Mutability = Literal["init_only", "live", "per_request"]
"""`init_only`: fixed once the engine is built. `live`: a transaction changes it for all, at a step boundary.

`per_request`: live as the engine's default, and every request may bring its own value instead.
"""


@cache
def mutability_of(path: str) -> Mutability:
    """Mutability of the field with this full path."""
    extra = _field_info(path).json_schema_extra
    declared = extra.get("mutability", "init_only") if isinstance(extra, Mapping) else "init_only"
    if declared not in get_args(Mutability):
        raise ConfigError(
            f"{path} declares mutability={declared!r}, which is none of {', '.join(get_args(Mutability))}",
            remedy="correct json_schema_extra of the field",
        )
    return cast(Mutability, declared)


def is_live(path: str) -> bool:
    """Whether a transaction may change the field with this full path."""
    return mutability_of(path) != "init_only"


def why_init_only(path: str) -> str:
    """What an engine does with an init-only field while it is built, so that a later value could not take effect."""
    prefixes = [path.rsplit(".", depth)[0] if depth else path for depth in range(path.count(".") + 1)]
    return next((_WHY[prefix] for prefix in prefixes if prefix in _WHY), "the engine was built with it")


def _field_info(path: str) -> FieldInfo:
    """The declaration of one field."""
    if path not in all_fields():
        raise ConfigError(f"{path}: no such field", remedy="use a full path, as `all_fields()` lists them")
    root, *groups, name = path.split(".")
    model: type[BaseModel] = ROOTS[root]
    for group in groups:
        model = cast(type[BaseModel], model.model_fields[group].annotation)
    return model.model_fields[name]


_WHY = {
    "shard": "the weights are already split over the ranks",
    "shard.timeout_s": "the ranks' watchdog already runs with it",
    "shard.all_reduce": "the ranks already add up by it",
    "inference.kernels": "the modules hold the kernels that were built for them",
    "shard.threads_per_rank": "the thread pools already exist",
    "inference.attention.backend": "the modules hold the backend; the engine's switch_backend() exchanges it",
    "inference.attention": "the modules hold the backend that was built for them",
    "inference.cache": "the cache tensors are already allocated",
    "inference.weights": "the weights are already read",
    "inference.dtype": "the weights and the cache already have this type",
    "inference.graphs": "decode steps are captured, or not, from the first one on",
    "inference.scheduler.overlap": "steps are prepared ahead, or not, from the first one on",
    "inference.max_model_len": "the cache and the rotary tables are already sized for it",
    "inference.strict": "what it refuses or records was met while the engine was built",
    "inference.prompt": "prompts that are queued already have its text around them",
    "inference.seed": "requests already drew from it; a request may bring its own seed",
}
