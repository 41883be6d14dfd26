"""InferenceConfig as ColossalAI's scripts construct it: 34 fields that become settings of ours, or are refused."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cached_property

import torch

from inference_shardformer.config.inference import InferenceConfig as OurInferenceConfig
from inference_shardformer.config.layers import Assignment, nest
from inference_shardformer.config.migrate.convert import convert
from inference_shardformer.config.migrate.fates import FAILURES
from inference_shardformer.config.migrate.inference_fields import DIFFERENT_DEFAULTS
from inference_shardformer.config.migrate.sources import FIELDS, INFERENCE, POSITIONS, Entry, ForeignSource
from inference_shardformer.config.origins import Level, Origin
from inference_shardformer.config.shard import ShardConfig
from inference_shardformer.errors import ConfigError

_LOGGER = logging.getLogger(__name__)


class InferenceConfig:
    """ColossalAI's `InferenceConfig(...)`, by the same names or positions; holds `shard` and `inference`, ours.

    Fields that are left out have ColossalAI's defaults (fp16, 256 tokens, sequences of 512). `entries` tells what
    became of each field, `values` what was given. Raises `ConfigError` that lists everything unknown or not offered.
    """

    def __init__(self, *arguments: object, **values: object) -> None:
        named = dict(zip((row.name for row in POSITIONS[INFERENCE]), arguments, strict=False))
        twice = [name for name in named if name in values]
        if twice or len(arguments) > len(named):
            raise ConfigError(
                f"InferenceConfig: {', '.join(twice)} given twice" if twice else "InferenceConfig: too many arguments",
                remedy="give each field once, by its name",
            )
        self.values: Mapping[str, object] = {**named, **values}
        self.shard, self.inference = self._converted()

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, object]) -> InferenceConfig:
        """The same of a mapping; an unknown key, which ColossalAI ignored, is refused."""
        return cls(**config_dict)

    @cached_property
    def entries(self) -> tuple[Entry, ...]:
        """What became of every field that was given."""
        unsaid = {name: FIELDS[INFERENCE][name].default for name in DIFFERENT_DEFAULTS if name not in self.values}
        values = {name: _plain(value) for name, value in {**self.values, **unsaid}.items()}
        return tuple(convert([ForeignSource(INFERENCE, "call", None, values=values)]).entries)

    def _converted(self) -> tuple[ShardConfig, OurInferenceConfig]:
        failed = [entry for entry in self.entries if entry.kind in FAILURES]
        if failed:
            raise ConfigError(
                "ColossalAI's InferenceConfig asks for what is not offered here: "
                + "; ".join(f"{entry.given} ({entry.sentence})" for entry in failed),
                remedy="change or leave out these fields; docs/from-colossalai.md says what takes their place",
            )
        for entry in self.entries:
            if entry.name in self.values and entry.kind in ("changed", "dropped"):
                _LOGGER.info("%s: %s", entry.given, entry.sentence)
        settings = {path: value for entry in self.entries for path, value in entry.settings.items()}
        assigned = [Assignment(path, value, Origin(Level.CALL)) for path, value in settings.items()]
        trees = {root: nest(assigned, root) for root in ("shard", "inference")}
        return ShardConfig.model_validate(trees["shard"]), OurInferenceConfig.model_validate(trees["inference"])

    def __repr__(self) -> str:
        given = ", ".join(f"{name}={value!r}" for name, value in self.values.items())
        return f"InferenceConfig({given})"


def _plain(value: object) -> object:
    return str(value) if isinstance(value, torch.dtype) else value
