"""Explains a configuration without ranks and weights: alone, or for one model on so many ranks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from inference_shardformer.attention.survey import BACKENDS, make_survey
from inference_shardformer.attention.verdicts import LayerVerdicts, verdicts_of
from inference_shardformer.compute.base import ComputeKind
from inference_shardformer.config.fields import open_field
from inference_shardformer.config.inference import TUNED, InferenceConfig
from inference_shardformer.config.loader import MergedConfig, gather, merge_layers
from inference_shardformer.config.shard import ShardConfig
from inference_shardformer.config.sources import ConfigSources
from inference_shardformer.config.violations import Violation, raise_all, show
from inference_shardformer.distributed.choosing import expected_all_reduce
from inference_shardformer.errors import BackendUnavailableError, EnvironmentMismatchError
from inference_shardformer.explaining.explanation import Explanation, kernel_selections
from inference_shardformer.huggingface import build_on_meta, locate_checkpoint, read_model
from inference_shardformer.planning.storage import WeightStorage
from inference_shardformer.resolving.examination import Examined, examine
from inference_shardformer.resolving.kernels import linear_kernel
from inference_shardformer.resolving.options import check_options
from inference_shardformer.resolving.resolution import (
    AT_ATTACH,
    HostFacts,
    decisions_on,
    memory_limit,
    resolve_device,
    resolve_overlap,
    resolve_threads,
)
from inference_shardformer.sharded import check_checkpoint, plan_ranks
from inference_shardformer.sharding.plan import RankLayout
from inference_shardformer.tuning.selecting import select_backends

if TYPE_CHECKING:
    from inference_shardformer.policies.base import Policy

_NEEDS_MODEL = "needs a model"


def explain(
    model: str | Path | None = None,
    shard_config: ShardConfig | None = None,
    inference_config: InferenceConfig | None = None,
    *,
    sources: ConfigSources | None = None,
    policy: Policy | None = None,
) -> Explanation:
    """What `InferenceShardformer` would decide for `model`, a folder or a hub id, on as many ranks as were asked for.

    Reads configuration and the headers of the weights, where those are there; starts no ranks and joins none. Raises
    what loading would raise for the same configuration, all of it at once.
    """
    layers = gather(sources, shard_config, inference_config)
    merged = merge_layers(layers)
    host, violations = host_asked_for(merged)
    if model is None:
        return _explain_alone(merged, host, violations)
    trust = merged.inference.weights.trust_remote_code
    seen = examine(
        layers,
        lambda: read_model(model, policy, trust_remote_code=trust),
        host,
        device=torch.device(host.device),
        found=violations,
    )
    return _explain_model(seen, model, host)


def host_asked_for(merged: MergedConfig) -> tuple[HostFacts, list[Violation]]:
    """This machine with as many ranks as were asked for, and what is wrong with that."""
    asked = merged.shard.tp_size
    tp_size = 1 if asked == "auto" else asked
    try:
        device, reason = resolve_device(merged.shard)
    except EnvironmentMismatchError as exc:
        given = f"shard.device = {show(merged.shard.device)}"
        violation = Violation("shard.device", given, merged.origin("shard.device"), exc.message, exc.remedy, exc)
        return HostFacts(tp_size, tp_size, "cpu", "the device that was asked for is absent"), [violation]
    all_reduce = expected_all_reduce(merged.shard.all_reduce, tp_size, torch.device(device))
    return HostFacts(tp_size, tp_size, device, reason, all_reduce), []


def _explain_alone(merged: MergedConfig, host: HostFacts, violations: list[Violation]) -> Explanation:
    """The settings without a model; what hangs on one stays open."""
    violations = [*merged.violations, *violations, *check_options(merged), *_unknown_backend(merged)]
    raise_all(violations)
    decided: dict[str, tuple[object, str]] = {
        "shard.tp_size": ("auto", "the size of the process group; one rank without a launcher"),
        "shard.device": (host.device, host.device_reason),
        "shard.threads_per_rank": resolve_threads(merged.shard, host.ranks_on_host),
        "shard.all_reduce": (host.all_reduce.name, host.all_reduce.reason),
        "inference.scheduler.overlap": resolve_overlap(merged.inference, host.device),
        "inference.cache.num_blocks": ("auto", AT_ATTACH),
        "inference.cache.memory_limit": memory_limit(merged.inference),
    }
    names = ("dtype", "max_model_len", "attention.backend", "cache.block_size", "cache.prefix_caching", "graphs")
    for name in (*names, "weights.compression", *(f"kernels.{kind.value}" for kind in ComputeKind)):
        decided[f"inference.{name}"] = (merged.value(f"inference.{name}"), _NEEDS_MODEL)
    options = {path: stack.winner.value for path, stack in merged.stacks.items() if open_field(path)}
    return Explanation(decisions_on(merged, decided, options))


def _unknown_backend(merged: MergedConfig) -> list[Violation]:
    """A backend of a name that nobody has is wrong for every model."""
    path, name = "inference.attention.backend", merged.inference.attention.backend
    if name in ("auto", TUNED, *BACKENDS.names()):
        return []
    error = BackendUnavailableError(BACKENDS.unknown(name), remedy="set attention.backend to auto or to a known name")
    return [Violation(path, f"{path} = {name}", merged.origin(path), error.message, error.remedy, error)]


def _explain_model(seen: Examined, model: str | Path, host: HostFacts) -> Explanation:
    folder = locate_checkpoint(model, with_weights=False)
    unsharded = build_on_meta(seen.hf_config, seen.facts.architecture)
    if any(folder.glob("*.safetensors")):
        check_checkpoint(seen.policy, seen.facts, unsharded, folder)
    plans = plan_ranks(seen.policy, seen.facts, unsharded, tp_size=host.tp_size)
    storage = WeightStorage.of(linear_kernel(seen.kernels), unsharded)
    return Explanation(
        decisions=seen.config.decisions,
        events=seen.events,
        facts=seen.facts,
        policy=type(seen.policy).__name__,
        rank_bytes=tuple(storage.weight_bytes(plan) for plan in plans),
        rank_verdicts=_rank_verdicts(seen, host.tp_size),
        kernels=kernel_selections(seen.kernels, host.all_reduce),
    )


def _rank_verdicts(seen: Examined, tp_size: int) -> tuple[tuple[LayerVerdicts, ...], ...]:
    """What every rank would say of the attention backends; ranks with the same specs are judged once."""
    config, device = seen.config, seen.groups.specs[0].device
    judged = {seen.groups: seen.selections}
    per_rank = [
        seen.policy.attention_groups(
            seen.facts,
            RankLayout(tp_size, rank),
            dtype=config.torch_dtype,
            device=device,
            block_size=seen.groups.specs[0].block_size,
        ).stored_in(seen.groups.specs[0].kv_dtype)
        for rank in range(tp_size)
    ]
    for groups in per_rank:
        if groups not in judged:
            judged[groups] = select_backends(groups, config.inference.attention, make_survey(device))
    return tuple(verdicts_of(groups, judged[groups]) for groups in per_rank)
