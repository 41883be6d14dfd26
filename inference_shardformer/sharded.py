"""Brings policy, plan, modules and weights together into one sharded model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from inference_shardformer.config.model import ModelFacts
from inference_shardformer.huggingface import build_on_meta, skip_attention_masks
from inference_shardformer.planning.storage import WeightStorage
from inference_shardformer.policies.base import BuildContext, Policy
from inference_shardformer.policies.builder import PolicyModuleBuilder
from inference_shardformer.resolving.preparation import Prepared
from inference_shardformer.sharding.checkpoint import SafetensorsCheckpoint, StateDictSource
from inference_shardformer.sharding.pickled import open_checkpoint
from inference_shardformer.sharding.plan import PlanContext, RankLayout, ShardingPlan, TensorInfo
from inference_shardformer.sharding.plan_file import PlanFile
from inference_shardformer.sharding.planner import make_plan
from inference_shardformer.sharding.save import PLAN_NAME, RankCheckpoint
from inference_shardformer.sharding.sharder import ModulePlacer, place_planned
from inference_shardformer.sharding.snapshot import ModelSnapshot
from inference_shardformer.sharding.stored import row_infos, stored_infos, stored_views, with_stored_names
from inference_shardformer.sharding.unshard import Original, check_reversible
from inference_shardformer.sharding.weights import Progress, WeightSource, check_names, load_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from inference_shardformer.ranks import Ranks


@dataclass
class Sharded:
    """A sharded model, the plan it follows, and the bytes of weights this rank read from files.

    `rank_bytes` are the bytes of weights that each rank holds. `original` is what the model was, and becomes again,
    unless `has_new_weights`: then it gets those.
    """

    model: PreTrainedModel
    plan: ShardingPlan
    bytes_read: int
    original: Original
    rank_bytes: tuple[int, ...] = ()
    has_new_weights: bool = False

    def note_new_weights(self) -> None:
        """From now on the weights are others than the original ones."""
        self.has_new_weights = True


@dataclass
class Reversal:
    """How far sharding a model in memory has come: what must be restored if it ends half way."""

    original: Original | None = None
    source: StateDictSource | None = None


def shard_checkpoint(
    prepared: Prepared, ranks: Ranks, folder: Path, progress: Progress | None, plan_file: PlanFile | None = None
) -> Sharded:
    """Build on the meta device, then read this rank's slices; names and shapes are compared before.

    With a `plan_file` the slices are those of the file, which is refused if it does not fit the model and the ranks.
    """
    model = build_on_meta(prepared.hf_config, prepared.facts.architecture, folder)
    checkpoint = open_checkpoint(folder, allow_pickle=prepared.config.inference.weights.allow_pickle)
    try:
        optional = _optional(prepared.policy, prepared.facts, checkpoint.tensors)
        check_names(_expected(prepared.policy, model), checkpoint.tensors, optional=optional)
        original, rank_bytes = _shard(prepared, ranks, model, checkpoint, progress, plan_file)
        return Sharded(model, original.plans[ranks.group.rank], checkpoint.bytes_read, original, rank_bytes)
    finally:
        checkpoint.close()


def shard_rank_files(prepared: Prepared, ranks: Ranks, folder: Path, progress: Progress | None) -> Sharded:
    """Build on the meta device, then read the file that this rank wrote; the plan beside it must be this model's."""
    model = build_on_meta(prepared.hf_config, prepared.facts.architecture, folder)
    plan_file = PlanFile.read(folder / PLAN_NAME)
    source = RankCheckpoint(folder, plan_file, tp_rank=ranks.group.rank, tp_size=ranks.group.size)
    try:
        original, rank_bytes = _shard(prepared, ranks, model, source, progress, plan_file)
        return Sharded(model, original.plans[ranks.group.rank], source.bytes_read, original, rank_bytes)
    finally:
        source.close()


def check_checkpoint(policy: Policy, facts: ModelFacts, model: PreTrainedModel, folder: Path) -> None:
    """Compare names and shapes in the headers of a checkpoint with the unsharded `model`; reads no weight."""
    checkpoint = SafetensorsCheckpoint(folder)
    try:
        optional = _optional(policy, facts, checkpoint.tensors)
        check_names(_expected(policy, model), checkpoint.tensors, optional=optional)
    finally:
        checkpoint.close()


def shard_model(
    prepared: Prepared,
    ranks: Ranks,
    model: PreTrainedModel,
    reversal: Reversal,
    *,
    must_be_reversible: bool = False,
    place: ModulePlacer = place_planned,
) -> Sharded:
    """Shard a model in memory, in place. `reversal` is told what that changes, before it does."""
    optional = prepared.policy.optional_tensors(prepared.facts)
    stored = [each for each in prepared.policy.stored(_infos(model)) if each.name not in optional]
    tensors = stored_views(stored, model.state_dict())
    source = reversal.source = StateDictSource(tensors)
    if must_be_reversible:
        is_quantized = prepared.config.inference.weights.quantization is not None
        check_reversible(source.tensors, prepared.config.torch_dtype, is_quantized=is_quantized)
    original, rank_bytes = _shard(prepared, ranks, model, source, None, reversal=reversal, place=place)
    return Sharded(model, original.plans[ranks.group.rank], 0, original, rank_bytes)


def _shard(
    prepared: Prepared,
    ranks: Ranks,
    model: PreTrainedModel,
    source: WeightSource,
    progress: Progress | None,
    plan_file: PlanFile | None = None,
    reversal: Reversal | None = None,
    place: ModulePlacer = place_planned,
) -> tuple[Original, tuple[int, ...]]:
    """What the model was, and the bytes that each rank holds."""
    table = prepared.policy.full_table(prepared.facts)
    plans = plan_ranks(prepared.policy, prepared.facts, model, tp_size=ranks.group.size)
    if plan_file is not None:
        tensors = planned_tensors(prepared.policy, prepared.facts, model)
        plans = plan_file.plans_for(plans, tensors, policy=prepared.policy.name)
    plan = plans[ranks.group.rank]
    context = BuildContext(
        facts=prepared.facts,
        hf_config=prepared.hf_config,
        group=ranks.group,
        attention=prepared.attention,
        kernels=prepared.kernels,
        vocab_range=plan.vocab_range,
    )
    original = _original(prepared, model, plans, source)
    storage = WeightStorage.of(prepared.kernels.linear, model)
    foreign = place(model, plan, PolicyModuleBuilder(table, context, adapters=prepared.policy.adapters))
    if foreign:
        original = original.without(foreign)
        plan = original.plans[ranks.group.rank]
    if reversal is not None:
        reversal.original = original
        original.snapshot.release(each.tensor for each in original.stored)
    load_weights(model, plan, source, dtype=prepared.config.torch_dtype, device=ranks.device, progress=progress)
    skip_attention_masks(model.config)
    model.eval()
    return original, tuple(storage.weight_bytes(each) for each in original.plans)


def _original(
    prepared: Prepared, model: PreTrainedModel, plans: Sequence[ShardingPlan], source: WeightSource
) -> Original:
    """The model as it is now."""
    infos, given = _infos(model), source.tensors
    optional = prepared.policy.optional_tensors(prepared.facts)
    stored = tuple(each for each in prepared.policy.stored(infos) if each.name not in optional)
    tensors = {name: TensorInfo(info.shape, given[name].dtype) for name, info in stored_infos(stored, infos).items()}
    return Original(tuple(plans), stored, tensors, ModelSnapshot(model))


def plan_ranks(policy: Policy, facts: ModelFacts, model: PreTrainedModel, *, tp_size: int) -> list[ShardingPlan]:
    """The plan of every rank for an unsharded model, which may be on the meta device."""
    rows = [entry.row for entry in policy.full_table(facts)]
    stored = [each for each in policy.stored(_infos(model)) if each.name not in policy.optional_tensors(facts)]
    tensors = row_infos(stored, _infos(model))
    paths = [path for path, _ in model.named_modules() if path]
    left_out = policy.adapters.left_out_paths(model)
    plans = [
        make_plan(
            rows,
            tensors=tensors,
            module_paths=paths,
            context=PlanContext(facts, RankLayout(tp_size, rank)),
            left_out=left_out,
        )
        for rank in range(tp_size)
    ]
    return [with_stored_names(plan, stored) for plan in plans]


def planned_tensors(policy: Policy, facts: ModelFacts, model: PreTrainedModel) -> dict[str, TensorInfo]:
    """The tensors of a model's checkpoint that a plan must cover."""
    optional = policy.optional_tensors(facts)
    return {name: info for name, info in _expected(policy, model).items() if name not in optional}


def _expected(policy: Policy, model: PreTrainedModel) -> dict[str, TensorInfo]:
    """Every tensor that a checkpoint of the unsharded model holds, by the checkpoint's names."""
    infos = _infos(model)
    return stored_infos(policy.stored(infos), infos)


def _infos(model: PreTrainedModel) -> dict[str, TensorInfo]:
    """Every tensor the unsharded model keeps, tied ones under each of their names."""
    return {name: TensorInfo(tuple(tensor.shape), str(tensor.dtype)) for name, tensor in model.state_dict().items()}


def _optional(policy: Policy, facts: ModelFacts, found: Mapping[str, TensorInfo]) -> set[str]:
    """Tensors whose presence means nothing: a tied head, and rotary buffers that old checkpoints carry."""
    stale = {name for name in found if name.endswith(".rotary_emb.inv_freq")}
    return stale | policy.optional_tensors(facts)
