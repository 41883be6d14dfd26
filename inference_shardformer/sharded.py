"""Brings policy, plan, modules and weights together into one sharded model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from inference_shardformer.huggingface import build_on_meta, skip_attention_masks
from inference_shardformer.policies.base import BuildContext, PolicyEntry
from inference_shardformer.policies.builder import PolicyModuleBuilder
from inference_shardformer.preparation import Prepared
from inference_shardformer.sharding.checkpoint import SafetensorsCheckpoint, StateDictSource
from inference_shardformer.sharding.plan import PlanContext, RankLayout, ShardingPlan, TensorInfo
from inference_shardformer.sharding.planner import make_plan
from inference_shardformer.sharding.sharder import replace_modules
from inference_shardformer.sharding.weights import Progress, WeightSource, check_names, load_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from inference_shardformer.ranks import Ranks


@dataclass(frozen=True)
class Sharded:
    """A sharded model, the plan it follows, and the bytes of weights this rank read from files."""

    model: PreTrainedModel
    plan: ShardingPlan
    bytes_read: int


def shard_checkpoint(prepared: Prepared, ranks: Ranks, folder: Path, progress: Progress | None) -> Sharded:
    """Build on the meta device, then read this rank's slices; names and shapes are compared before."""
    model = build_on_meta(prepared.hf_config, prepared.facts.architecture)
    checkpoint = SafetensorsCheckpoint(folder)
    try:
        optional = _optional(prepared, checkpoint.tensors)
        check_names(_expected(model), checkpoint.tensors, optional=optional)
        plan = _shard(prepared, ranks, model, checkpoint, progress)
        return Sharded(model, plan, checkpoint.bytes_read)
    finally:
        checkpoint.close()


def shard_model(prepared: Prepared, ranks: Ranks, model: PreTrainedModel) -> Sharded:
    """Shard a model in memory, in place."""
    optional = prepared.policy.optional_tensors(prepared.facts)
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name not in optional}
    return Sharded(model, _shard(prepared, ranks, model, StateDictSource(tensors), None), bytes_read=0)


def _shard(
    prepared: Prepared, ranks: Ranks, model: PreTrainedModel, source: WeightSource, progress: Progress | None
) -> ShardingPlan:
    table = prepared.policy.table(prepared.facts)
    plan = _plan(prepared, ranks, model, table)
    context = BuildContext(prepared.facts, prepared.hf_config, ranks.group, prepared.backend, plan.vocab_range)
    replace_modules(model, plan, PolicyModuleBuilder(table, context))
    load_weights(model, plan, source, dtype=prepared.config.torch_dtype, device=ranks.device, progress=progress)
    skip_attention_masks(model.config)
    model.eval()
    return plan


def _plan(prepared: Prepared, ranks: Ranks, model: PreTrainedModel, table: tuple[PolicyEntry, ...]) -> ShardingPlan:
    optional = prepared.policy.optional_tensors(prepared.facts)
    return make_plan(
        [entry.row for entry in table],
        tensors={name: info for name, info in _expected(model).items() if name not in optional},
        module_paths=[path for path, _ in model.named_modules() if path],
        context=PlanContext(prepared.facts, RankLayout(ranks.group.size, ranks.group.rank)),
    )


def _expected(model: PreTrainedModel) -> dict[str, TensorInfo]:
    """Every tensor the unsharded model keeps, tied ones under each of their names."""
    return {name: TensorInfo(tuple(tensor.shape), str(tensor.dtype)) for name, tensor in model.state_dict().items()}


def _optional(prepared: Prepared, found: Mapping[str, TensorInfo]) -> set[str]:
    """Tensors whose presence means nothing: a tied head, and rotary buffers that old checkpoints carry."""
    stale = {name for name in found if name.endswith(".rotary_emb.inv_freq")}
    return stale | prepared.policy.optional_tensors(prepared.facts)
