"""Turns what was asked into what is done: every "auto" becomes a value with a reason."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from pydantic import BaseModel

from inference_shardformer.config.inference import InferenceConfig
from inference_shardformer.config.model import ModelFacts
from inference_shardformer.config.origins import DEFAULT, Origin
from inference_shardformer.config.resolved import TORCH_DTYPES, Decision, ResolvedConfig
from inference_shardformer.config.shard import ShardConfig
from inference_shardformer.errors import ConfigError, EnvironmentMismatchError

_FALLBACK_DTYPE = "fp32"


class Decided(NamedTuple):
    """A value and why it was taken; no reason where it is what was asked."""

    value: str
    reason: str


@dataclass(frozen=True)
class HostFacts:
    """What resolving may know of the machine."""

    tp_size: int
    ranks_on_host: int
    device: str
    device_reason: str


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
        return Decided(str(facts.checkpoint_dtype), "the type of the checkpoint")
    return Decided(_FALLBACK_DTYPE, "the checkpoint names no type")


def resolve(
    shard: ShardConfig,
    inference: InferenceConfig,
    *,
    facts: ModelFacts,
    host: HostFacts,
    provenance: Mapping[str, Origin],
    dtype: Decided,
    attention_backend: Decided,
) -> ResolvedConfig:
    """Decide every value for one model on one host. A function of its arguments and the core count alone."""
    threads, threads_reason = _threads(shard, host)
    max_model_len, length_reason = _max_model_len(inference, facts)
    decided = {
        "shard.tp_size": (host.tp_size, "the size of the process group"),
        "shard.device": (host.device, host.device_reason),
        "shard.threads_per_rank": (threads, threads_reason),
        "inference.dtype": dtype,
        "inference.max_model_len": (max_model_len, length_reason),
        "inference.attention.backend": attention_backend,
    }
    asked = {**_leaves(shard, "shard"), **_leaves(inference, "inference")}
    decisions = tuple(
        Decision(
            path=path,
            value=str(decided[path][0] if path in decided else value),
            origin=str(provenance.get(path, DEFAULT)),
            reason=decided[path][1] if path in decided and value == "auto" else "",
        )
        for path, value in asked.items()
    )
    return ResolvedConfig(
        shard=shard,
        inference=inference,
        tp_size=host.tp_size,
        device=host.device,
        threads_per_rank=threads,
        dtype=dtype.value,
        attention_backend=attention_backend.value,
        max_model_len=max_model_len,
        decisions=decisions,
    )


def _threads(shard: ShardConfig, host: HostFacts) -> tuple[int, str]:
    if shard.threads_per_rank != "auto":
        return shard.threads_per_rank, ""
    if host.ranks_on_host == 1:
        return torch.get_num_threads(), "torch's own number, one rank on this host"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // host.ranks_on_host), f"{cores} cores shared by {host.ranks_on_host} ranks"


def _max_model_len(inference: InferenceConfig, facts: ModelFacts) -> tuple[int, str]:
    context = facts.max_position_embeddings
    if inference.max_model_len == "auto":
        return context, "the model's context"
    if inference.max_model_len > context:
        raise ConfigError(
            f"inference.max_model_len={inference.max_model_len} is longer than the model's context of {context} tokens",
            remedy=f"use at most {context}, or a checkpoint with scaled rotary embeddings",
        )
    return inference.max_model_len, ""


def _leaves(model: BaseModel, prefix: str) -> dict[str, object]:
    leaves: dict[str, object] = {}
    for name in type(model).model_fields:
        value = getattr(model, name)
        path = f"{prefix}.{name}"
        leaves.update(_leaves(value, path) if isinstance(value, BaseModel) else {path: value})
    return leaves
