"""ConfigSnapshot: every final value of one epoch, read by attribute, path or mapping."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from operator import attrgetter
from typing import NamedTuple

from inference_shardformer.config.fields import all_fields, all_groups, full_path, suggest
from inference_shardformer.config.inference import InferenceConfig
from inference_shardformer.config.mutability import Mutability, mutability_of
from inference_shardformer.config.resolved import ResolvedConfig
from inference_shardformer.config.shard import ShardConfig
from inference_shardformer.errors import ConfigError


class UnknownSettingError(ConfigError, KeyError, AttributeError):
    """A name that is no setting; the nearest known one is in the remedy. Caught like the error of any spelling."""


class SettingState(NamedTuple):
    """One field of a running engine: its final value, whether it may change, where it came from and why."""

    path: str
    value: object
    mutability: Mutability
    origin: str
    reason: str


@dataclass(frozen=True)
class ConfigSnapshot:
    """All values of one epoch. Immutable: values that belong together are read from one snapshot.

    `shard` and `inference` hold the final values (nothing that is decided reads "auto"), `config` also what was asked.
    `snapshot.inference.cache.block_size`, `snapshot.get("cache.block_size")` and
    `snapshot["inference.cache.block_size"]` are the same value.
    """

    epoch: int
    config: ResolvedConfig
    shard: ShardConfig = field(init=False, repr=False, compare=False)
    inference: InferenceConfig = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # frozen from here on; validated again because rules between fields must also hold for what was decided
        object.__setattr__(self, "shard", _final_shard(self.config))
        object.__setattr__(self, "inference", _final_inference(self.config))

    def get(self, path: str) -> object:
        """The final value of a field; the root of the path may be left out. Unknown: `UnknownSettingError`."""
        return _reader(path)(self)

    def __getitem__(self, path: str) -> object:
        return _reader(path)(self)

    def __contains__(self, path: object) -> bool:
        return isinstance(path, str) and full_path(path) in all_fields()

    def __iter__(self) -> Iterator[str]:
        return iter(all_fields())

    def __len__(self) -> int:
        return len(all_fields())

    def keys(self) -> Iterator[str]:
        """Full paths of all fields, in the order of their declaration."""
        return iter(self)

    def items(self) -> Iterator[tuple[str, object]]:
        """Every full path with its final value."""
        return ((path, self[path]) for path in self)

    def describe(self) -> tuple[SettingState, ...]:
        """Every field: value, mutability, origin and reason."""
        decisions = {decision.path: decision for decision in self.config.decisions}
        return tuple(
            SettingState(
                path,
                value,
                mutability_of(path),
                str(decisions[path].origin) if path in decisions else "",
                decisions[path].reason if path in decisions else "",
            )
            for path, value in self.items()
        )


def unknown_setting(path: object) -> UnknownSettingError:
    """The error for a name that is no field: a group's name, or nothing known."""
    if isinstance(path, str) and full_path(path) in all_groups():
        example = next(known for known in all_fields() if known.startswith(f"{full_path(path)}."))
        return UnknownSettingError(f"{path} is a group of settings, not one", remedy=f"name one, for example {example}")
    near = suggest(path) if isinstance(path, str) else ""
    remedy = f"did you mean {near}?" if near else "`describe()` lists the settings"
    return UnknownSettingError(f"{path!r} is not a setting", remedy=remedy)


@cache  # errors are not cached, so it holds known names alone
def _reader(path: str) -> attrgetter[object]:
    """What reads this field from a snapshot."""
    full = full_path(path) if isinstance(path, str) else ""
    if full not in all_fields():
        raise unknown_setting(path)
    return attrgetter(full)


def _final_shard(config: ResolvedConfig) -> ShardConfig:
    """What was asked, with what was decided in its place."""
    return type(config.shard).model_validate(
        {
            **config.shard.__dict__,
            "tp_size": config.tp_size,
            "device": config.device,
            "threads_per_rank": config.threads_per_rank,
            "all_reduce": config.all_reduce,
        }
    )


def _final_inference(config: ResolvedConfig) -> InferenceConfig:
    """What was asked, with what was decided in its place."""
    asked = config.inference
    sizes = {"num_blocks": config.num_blocks, "block_size": config.block_size}
    cache = {**asked.cache.__dict__, **{name: size for name, size in sizes.items() if size is not None}}
    cache["prefix_caching"] = config.prefix_caching
    return type(asked).model_validate(
        {
            **asked.__dict__,
            "dtype": config.dtype,
            "max_model_len": config.max_model_len,
            "graphs": config.graphs,
            "cache": cache,
            "scheduler": {**asked.scheduler.__dict__, "overlap": config.overlap},
            "attention": {**asked.attention.__dict__, "backend": config.attention_backend},
            "kernels": {**asked.kernels.__dict__, **dict(config.kernels)},
            "weights": {**asked.weights.__dict__, "compression": config.compression},
        }
    )
