"""Plans a model without ranks, network and weights: from its configuration and the headers of its checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from inference_shardformer.config.inference import InferenceConfig
from inference_shardformer.config.loader import gather, merge_layers
from inference_shardformer.config.shard import ShardConfig
from inference_shardformer.config.sources import ConfigSources
from inference_shardformer.explaining.offline import host_asked_for
from inference_shardformer.huggingface import build_on_meta, locate_checkpoint, read_model
from inference_shardformer.kv_cache.sizing import free_memory
from inference_shardformer.kv_cache.spec import KVCacheSpec
from inference_shardformer.planning.memory import Memory, plan_capacity, plan_workspace
from inference_shardformer.planning.report import PlanReport
from inference_shardformer.planning.rows import parameter_rows
from inference_shardformer.planning.storage import WeightStorage
from inference_shardformer.planning.text import amount
from inference_shardformer.planning.traffic import plan_traffic
from inference_shardformer.resolving.examination import Examined, examine
from inference_shardformer.resolving.kernels import linear_kernel
from inference_shardformer.resolving.resolution import HostFacts
from inference_shardformer.sharded import check_checkpoint, plan_ranks, planned_tensors
from inference_shardformer.sharding.plan_file import PlanFile

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from inference_shardformer.policies.base import Policy


def plan_model(
    model: str | Path,
    shard_config: ShardConfig | None = None,
    inference_config: InferenceConfig | None = None,
    *,
    sources: ConfigSources | None = None,
    policy: Policy | None = None,
    memory: int | None = None,
) -> PlanReport:
    """The plan of `model`, a folder or a hub id, for as many ranks as were asked for, and what it means in bytes.

    `memory` is what each rank may use, in bytes; without it, its share of what is free on this machine. Reads
    `config.json`, and the headers of the weights where they are there. Raises what loading would raise.
    """
    layers = gather(sources, shard_config, inference_config)
    merged = merge_layers(layers)
    host, violations = host_asked_for(merged)
    trust = merged.inference.weights.trust_remote_code
    device = torch.device(host.device)
    read = lambda: read_model(model, policy, trust_remote_code=trust)  # noqa: E731
    seen = examine(layers, read, host, device=device, found=violations)
    unsharded = build_on_meta(seen.hf_config, seen.facts.architecture)
    folder = locate_checkpoint(model, with_weights=False)
    if any(folder.glob("*.safetensors")):
        check_checkpoint(seen.policy, seen.facts, unsharded, folder)
    return _report(seen, unsharded, host, _memory(memory, host, device))


def _report(seen: Examined, unsharded: PreTrainedModel, host: HostFacts, memory: Memory) -> PlanReport:
    policy, facts, config = seen.policy, seen.facts, seen.config
    dtype = config.torch_dtype
    plans = plan_ranks(policy, facts, unsharded, tp_size=host.tp_size)
    tensors = planned_tensors(policy, facts, unsharded)
    storage = WeightStorage.of(linear_kernel(seen.kernels), unsharded)
    rank_bytes = tuple(storage.weight_bytes(plan) for plan in plans)
    spec = seen.groups.specs[0]
    kv_cache = KVCacheSpec(facts.num_layers, spec.num_kv_heads, spec.head_dim, spec.block_size, spec.cache_dtype)
    limits = config.inference.scheduler
    workspace = plan_workspace(
        plans[0], dtype, num_tokens=limits.max_num_batched_tokens, num_sequences=limits.max_num_seqs
    )
    return PlanReport(
        facts=facts,
        policy=policy.name,
        tp_size=host.tp_size,
        dtype=config.dtype,
        device=config.device,
        compression=seen.kernels.compression(),
        rows=tuple(parameter_rows(plans, {name: info.shape for name, info in tensors.items()}, storage)),
        rank_bytes=rank_bytes,
        kv_cache=kv_cache,
        workspace=workspace,
        capacity=plan_capacity(
            kv_cache,
            memory,
            weight_bytes=max(rank_bytes),
            workspace=workspace,
            max_model_len=config.max_model_len,
        ),
        traffic=plan_traffic(plans[0], dtype, embeddings=storage.embeddings),
        tp_sizes={size: policy.tp_size_problem(facts, size) for size in range(1, facts.total_num_heads + 1)},
        file=PlanFile.of(plans, tensors, policy=policy.name),
    )


def _memory(asked: int | None, host: HostFacts, device: torch.device) -> Memory:
    """What each rank may use: ranks on a CPU share its memory, others have a device of their own."""
    if asked is not None:
        return Memory(asked, "as asked")
    free = free_memory(device)
    if device.type != "cpu":
        return Memory(free, "free on the device now")
    return Memory(free // host.ranks_on_host, f"its share of {amount(free)} free on this machine now")
