"""The two ShardConfigs: what ColossalAI's says in our terms, and one of ColossalAI's for ranks of ours."""

from __future__ import annotations

import logging
from dataclasses import fields
from typing import TYPE_CHECKING, NamedTuple

import torch.distributed as dist

from inference_shardformer.bridges.colossalai.upstream import ShardConfig as ColossalShardConfig
from inference_shardformer.config.migrate.convert import convert
from inference_shardformer.config.migrate.fates import FAILURES
from inference_shardformer.config.migrate.sources import SHARD, ForeignSource
from inference_shardformer.config.shard import ShardConfig
from inference_shardformer.errors import ConfigError

if TYPE_CHECKING:
    from inference_shardformer.config.migrate.sources import Entry

_LOGGER = logging.getLogger(__name__)
_TOLD = frozenset(
    {"enable_all_optimization", "enable_fused_normalization", "enable_flash_attention", "enable_jit_fused"}
)


class ShardSettings(NamedTuple):
    """How the model is cut: our configuration, the group of the ranks, and ColossalAI's if it was given."""

    ours: ShardConfig
    process_group: dist.ProcessGroup | None
    theirs: ColossalShardConfig | None


def read_shard_config(
    shard_config: ColossalShardConfig | ShardConfig | None, process_group: dist.ProcessGroup | None
) -> ShardSettings:
    """Both configurations from the one that was given.

    Raises `ConfigError` that names every field of ColossalAI's that asks for something which is not offered here.
    """
    if isinstance(shard_config, ColossalShardConfig):
        if process_group is not None:
            raise ConfigError(
                "process_group was given beside ColossalAI's ShardConfig, which names one itself",
                remedy="give ShardConfig(tensor_parallel_process_group=group) alone",
            )
        return ShardSettings(_ours(shard_config), shard_config.tensor_parallel_process_group, shard_config)
    if shard_config is None or isinstance(shard_config, ShardConfig):
        return ShardSettings(shard_config or ShardConfig(), process_group, None)
    raise ConfigError(
        f"shard_config is a {type(shard_config).__name__}",
        remedy="give colossalai.shardformer.ShardConfig or inference_shardformer.ShardConfig",
    )


def colossal_config(process_group: dist.ProcessGroup | None) -> ColossalShardConfig:
    """ColossalAI's configuration for the ranks of a group, or of the default one; they are joined already."""
    if not dist.is_initialized():
        return ColossalShardConfig(enable_tensor_parallelism=False)
    return ColossalShardConfig(tensor_parallel_process_group=process_group)


def _ours(theirs: ColossalShardConfig) -> ShardConfig:
    """Our configuration; the fates of the fields are those of `migrate`."""
    values = {field.name: getattr(theirs, field.name) for field in fields(theirs)}
    entries = convert([ForeignSource(SHARD, "call", None, values=values)]).entries
    refused = [entry for entry in entries if entry.kind in FAILURES]
    if refused:
        raise ConfigError(
            "ColossalAI's ShardConfig asks for what is not offered here: " + "; ".join(map(_sentence, refused)),
            remedy="leave these fields out",
        )
    for entry in entries:
        if entry.kind == "changed" and entry.name in _TOLD:
            _LOGGER.info("%s: %s", entry.given, entry.sentence)
    return ShardConfig(tp_size="auto" if theirs.enable_tensor_parallelism else 1)


def _sentence(entry: Entry) -> str:
    return f"{entry.given} ({entry.sentence})"
