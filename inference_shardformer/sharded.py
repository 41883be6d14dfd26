"""Brings policy, plan, modules and weights together into one sharded model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from inference_shardformer.config.model import ModelFacts
from inference_shardformer.huggingface import build_on_meta, skip_attention_masks
from inference_shardformer.policies.base import BuildContext, Policy
from inference_shardformer.policies.builder import PolicyModuleBuilder
from inference_shardformer.resolving.preparation import Prepared
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
    """A sharded model, the plan it follows, and the bytes of weights this rank read from files.

    `rank_bytes` are the bytes of weights that each rank holds.
    """

    model: PreTrainedModel
    plan: ShardingPlan
    bytes_read: int
    rank_bytes: tuple[int, ...] = ()


def shard_checkpoint(prepared: Prepared, ranks: Ranks, folder: Path, progress: Progress | None) -> Sharded:
    """Build on the meta device, then read this rank's slices; names and shapes are compared before."""
    model = build_on_meta(prepared.hf_config, prepared.facts.architecture)
    checkpoint = SafetensorsCheckpoint(folder)
    try:
        optional = _optional(prepared.policy, prepared.facts, checkpoint.tensors)
        check_names(_expected(model), checkpoint.tensors, optional=optional)
        plan, rank_bytes = _shard(prepared, ranks, model, checkpoint, progress)
        return Sharded(model, plan, checkpoint.bytes_read, rank_bytes)
    finally:
        checkpoint.close()


def check_checkpoint(policy: Policy, facts: ModelFacts, model: PreTrainedModel, folder: Path) -> None:
    """Compare names and shapes in the headers of a checkpoint with the unsharded `model`; reads no weight."""
    checkpoint = SafetensorsCheckpoint(folder)
    try:
        check_names(_expected(model), checkpoint.tensors, optional=_optional(policy, facts, checkpoint.tensors))
    finally:
        checkpoint.close()


def shard_model(prepared: Prepared, ranks: Ranks, model: PreTrainedModel) -> Sharded:
    """Shard a model in memory, in place."""
    optional = prepared.policy.optional_tensors(prepared.facts)
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name not in optional}
    plan, rank_bytes = _shard(prepared, ranks, model, StateDictSource(tensors), None)
    return Sharded(model, plan, bytes_read=0, rank_bytes=rank_bytes)


def _shard(
    prepared: Prepared, ranks: Ranks, model: PreTrainedModel, source: WeightSource, progress: Progress | None
) -> tuple[ShardingPlan, tuple[int, ...]]:
    """The plan of this rank, and the bytes that each rank holds."""
    table = prepared.policy.full_table(prepared.facts)
    plans = plan_ranks(prepared.policy, prepared.facts, model, tp_size=ranks.group.size)
    plan = plans[ranks.group.rank]
    context = BuildContext(prepared.facts, prepared.hf_config, ranks.group, prepared.backend, plan.vocab_range)
    replace_modules(model, plan, PolicyModuleBuilder(table, context, adapters=prepared.policy.adapters))
    load_weights(model, plan, source, dtype=prepared.config.torch_dtype, device=ranks.device, progress=progress)
    skip_attention_masks(model.config)
    model.eval()
    return plan, tuple(each.num_bytes(prepared.config.torch_dtype.itemsize) for each in plans)


def plan_ranks(policy: Policy, facts: ModelFacts, model: PreTrainedModel, *, tp_size: int) -> list[ShardingPlan]:
    """The plan of every rank for an unsharded model, which may be on the meta device."""
    optional = policy.optional_tensors(facts)
    rows = [entry.row for entry in policy.full_table(facts)]
    tensors = {name: info for name, info in _expected(model).items() if name not in optional}
    paths = [path for path, _ in model.named_modules() if path]
    left_out = policy.adapters.left_out_paths(model)
    return [
        make_plan(
            rows,
            tensors=tensors,
            module_paths=paths,
            context=PlanContext(facts, RankLayout(tp_size, rank)),
            left_out=left_out,
        )
        for rank in range(tp_size)
    ]


def _expected(model: PreTrainedModel) -> dict[str, TensorInfo]:
    """Every tensor the unsharded model keeps, tied ones under each of their names."""
    return {name: TensorInfo(tuple(tensor.shape), str(tensor.dtype)) for name, tensor in model.state_dict().items()}


def _optional(policy: Policy, facts: ModelFacts, found: Mapping[str, TensorInfo]) -> set[str]:
    """Tensors whose presence means nothing: a tied head, and rotary buffers that old checkpoints carry."""
    stale = {name for name in found if name.endswith(".rotary_emb.inv_freq")}
    return stale | policy.optional_tensors(facts)
