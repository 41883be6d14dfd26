"""Turns what was asked into what is done: every "auto" becomes a value with a reason."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch

from inference_shardformer.attention.block_size import USUAL_BLOCK_SIZE
from inference_shardformer.compute.linear import Compression
from inference_shardformer.config.fields import all_fields
from inference_shardformer.config.frozen import frozen_or_text
from inference_shardformer.config.inference import TUNED, InferenceConfig
from inference_shardformer.config.loader import MergedConfig
from inference_shardformer.config.model import ModelFacts
from inference_shardformer.config.resolved import COMPRESSION, TORCH_DTYPES, Beaten, Decision, ResolvedConfig
from inference_shardformer.config.shard import ShardConfig
from inference_shardformer.distributed.all_reduce import AllReduceChoice
from inference_shardformer.errors import EnvironmentMismatchError
from inference_shardformer.resolving.prefix_caching import choose_prefix_caching

AT_ATTACH = "decided when the engine is attached, by the memory that is free then"
_FALLBACK_DTYPE = "fp32"
_UNCOMPRESSED = Compression("none", "nobody said that the linear kernel compresses weights")


class Decided(NamedTuple):
    """A value and why it was taken; no reason where it is what was asked."""

    value: str
    reason: str


class Overlap(NamedTuple):
    """Whether a step is prepared while another runs, and why."""

    value: Literal["on", "off"]
    reason: str


@dataclass(frozen=True)
class HostFacts:
    """What resolving may know of the machine; `all_reduce` is how partial sums are added."""

    tp_size: int
    ranks_on_host: int
    device: str
    device_reason: str
    all_reduce: AllReduceChoice = field(default_factory=lambda: AllReduceChoice("none"))


@dataclass(frozen=True)
class Choices:
    """What others have chosen: the attention backend, the kernels, and the values of options, by their path."""

    attention_backend: Decided
    options: Mapping[str, object] = field(default_factory=dict)
    kernels: Mapping[str, Decided] = field(default_factory=dict)
    block_size: tuple[int, str] = (USUAL_BLOCK_SIZE, "the usual size")
    graphs: tuple[int, str] = (0, "")  # the largest captured batch size, 0: none
    compression: Compression = _UNCOMPRESSED


def resolve_device(shard: ShardConfig) -> tuple[str, str]:
    """The device type of every rank and why; a named device that is absent is refused."""
    has_cuda = torch.cuda.is_available()
    if shard.device == "auto":
        return ("cuda", "a CUDA device is present") if has_cuda else ("cpu", "no CUDA device is present")
    if shard.device == "cuda" and not has_cuda:
        raise EnvironmentMismatchError(
            "shard.device='cuda', but torch sees no CUDA device on this machine",
            remedy="use shard.device='cpu' (or 'auto'), or install a CUDA build of torch and its driver",
        )
    return shard.device, "as asked"


def resolve_dtype(inference: InferenceConfig, facts: ModelFacts) -> Decided:
    """The compute type, by its short name."""
    if inference.dtype != "auto":
        return Decided(inference.dtype, "")
    if facts.checkpoint_dtype in TORCH_DTYPES:
        return Decided(str(facts.checkpoint_dtype), "the type of the weights")
    return Decided(_FALLBACK_DTYPE, "the weights are of no such type")


def resolve_threads(shard: ShardConfig, ranks_on_host: int) -> tuple[int, str]:
    """The CPU threads of each rank and why."""
    if shard.threads_per_rank != "auto":
        return shard.threads_per_rank, ""
    if ranks_on_host == 1:
        return torch.get_num_threads(), "torch's own number, one rank on this host"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // ranks_on_host), f"{cores} cores shared by {ranks_on_host} ranks"


def resolve_length(inference: InferenceConfig, facts: ModelFacts) -> tuple[int, str]:
    """The longest sequence and why."""
    if inference.max_model_len == "auto":
        return facts.max_position_embeddings, "the model's context"
    return inference.max_model_len, ""


def resolve_overlap(inference: InferenceConfig, device: str) -> Overlap:
    """Whether host work is done while the device computes, and why."""
    if inference.scheduler.overlap != "auto":
        return Overlap(inference.scheduler.overlap, "")
    if device == "cpu":
        return Overlap("off", "the CPU computes the step itself, and has nothing to wait for")
    return Overlap("on", f"the host would wait for {device}")


def resolve(merged: MergedConfig, *, facts: ModelFacts, host: HostFacts, choices: Choices) -> ResolvedConfig:
    """Decide every value for one model on one host. A function of its arguments and the core count alone."""
    threads, threads_reason = resolve_threads(merged.shard, host.ranks_on_host)
    max_model_len, length_reason = resolve_length(merged.inference, facts)
    dtype = resolve_dtype(merged.inference, facts)
    overlap = resolve_overlap(merged.inference, host.device)
    prefix_caching = choose_prefix_caching(merged.inference, facts)
    num_blocks, asked_size = merged.inference.cache.num_blocks, merged.inference.cache.block_size
    decided: dict[str, tuple[object, str]] = {
        "shard.tp_size": (host.tp_size, "the size of the process group"),
        "shard.device": (host.device, host.device_reason),
        "shard.threads_per_rank": (threads, threads_reason),
        "shard.all_reduce": (host.all_reduce.name, host.all_reduce.reason),
        "inference.dtype": dtype,
        "inference.max_model_len": (max_model_len, length_reason),
        "inference.attention.backend": choices.attention_backend,
        "inference.cache.block_size": choices.block_size,
        "inference.graphs": (choices.graphs[0] or "none", choices.graphs[1]),
        "inference.scheduler.overlap": overlap,
        "inference.cache.prefix_caching": prefix_caching,
        COMPRESSION: choices.compression,
        "inference.cache.num_blocks": (num_blocks, AT_ATTACH),
        "inference.cache.memory_limit": memory_limit(merged.inference),
        **choices.kernels,
    }
    return ResolvedConfig(
        shard=merged.shard,
        inference=merged.inference,
        tp_size=host.tp_size,
        device=host.device,
        threads_per_rank=threads,
        dtype=dtype.value,
        attention_backend=choices.attention_backend.value,
        max_model_len=max_model_len,
        decisions=decisions_on(merged, decided, choices.options),
        num_blocks=None if num_blocks == "auto" else num_blocks,
        all_reduce=host.all_reduce.name,
        block_size=choices.block_size[0] if asked_size == "auto" else asked_size,
        graphs=choices.graphs[0] or "none",
        overlap=overlap.value,
        prefix_caching=prefix_caching.value,
        compression=choices.compression.value,
        kernels=tuple((path.rpartition(".")[2], decided.value) for path, decided in choices.kernels.items()),
    )


def memory_limit(inference: InferenceConfig) -> tuple[object, str]:
    """What an automatic limit means: nothing where the number of blocks is given."""
    if inference.cache.num_blocks != "auto":
        return None, "not used, cache.num_blocks was given"
    return inference.cache.memory_limit, "what the sequences need, within half of the memory that is free at attach"


def decisions_on(
    merged: MergedConfig, decided: Mapping[str, tuple[object, str]], options: Mapping[str, object]
) -> tuple[Decision, ...]:
    """The decision on every field in order of declaration, and on every option of the chosen plug-ins in its place."""
    decisions: list[Decision] = []
    for path, known in all_fields().items():
        if known.is_open:
            own = {name: value for name, value in options.items() if name.startswith(f"{path}.")}
            decisions += [_decision(merged, name, value, "") for name, value in own.items()]
            continue
        asked = merged.value(path)
        value, reason = decided.get(path, (asked, "")) if asked in ("auto", TUNED) else (asked, "")
        decisions.append(_decision(merged, path, value, reason))
    return tuple(decisions)


def _decision(merged: MergedConfig, path: str, value: object, reason: str) -> Decision:
    beaten = tuple(Beaten(frozen_or_text(item.value), item.origin) for item in merged.beaten(path))
    return Decision(path, value, merged.origin(path), reason, beaten)
