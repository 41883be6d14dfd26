"""Reasons: what a spec asks beyond what a backend declared. The only place where the two are compared.

Stable codes: shape, head_counts, dtype, kv_dtype, head_dim, block_size, gqa_ratio, device, and feature_<name> for
each feature. Those of `extra_reasons` are the backend's own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from inference_shardformer.attention.capabilities import AttentionCapabilities, Feature
from inference_shardformer.attention.sizes import Sizes
from inference_shardformer.attention.spec import AttentionSpec, Reason

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
UNSOUND = frozenset({"shape", "head_counts"})  # codes of specs that no backend can serve

_FEATURE_REMEDIES = {
    Feature.CHUNKED_PREFILL: "raise scheduler.max_num_batched_tokens above the longest prompt, or use another backend",
    Feature.SLIDING_WINDOW: "use a backend with sliding windows",
    Feature.SOFTCAP: "use a backend with capped scores",
}


def capability_reasons(capabilities: AttentionCapabilities, spec: AttentionSpec) -> list[Reason]:
    """Every reason against serving `spec` with `capabilities`: unsound counts, then one for each fact not met."""
    return [
        *_shape_reasons(spec),
        *_dtype_reasons(capabilities, spec),
        *_size_reasons(capabilities, spec),
        *_feature_reasons(capabilities, spec),
        *_device_reasons(capabilities, spec),
    ]


def _shape_reasons(spec: AttentionSpec) -> list[Reason]:
    reasons = []
    counts = {
        "num_heads": spec.num_heads,
        "num_kv_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "block_size": spec.block_size,
        "sliding_window": 1 if spec.sliding_window is None else spec.sliding_window,
    }
    for name, value in counts.items():
        if value < 1:
            reasons.append(Reason("shape", f"{name}={value} is below 1", f"give {name} a value of at least 1"))
    if spec.softcap is not None and not (0 < spec.softcap < math.inf):
        message = f"softcap={spec.softcap} is not a finite number above 0"
        reasons.append(Reason("shape", message, "give softcap a finite value above 0, or None for no cap"))
    if spec.num_kv_heads > 0 and spec.num_heads % spec.num_kv_heads:
        reasons.append(
            Reason(
                "head_counts",
                f"num_heads={spec.num_heads} is not a multiple of num_kv_heads={spec.num_kv_heads}",
                "choose a tensor-parallel size that gives each rank whole groups of query heads",
            )
        )
    return reasons


def _dtype_reasons(capabilities: AttentionCapabilities, spec: AttentionSpec) -> list[Reason]:
    reasons = []
    if spec.dtype not in capabilities.dtypes:
        names = _names(capabilities.dtypes)
        reasons.append(Reason("dtype", f"dtype {_short(spec.dtype)} is not among {names}", f"choose one of {names}"))
    if spec.cache_dtype not in (spec.dtype, *capabilities.kv_dtypes):
        names = _names((spec.dtype, *capabilities.kv_dtypes))
        message = f"keys and values in {_short(spec.cache_dtype)} are not among {names}"
        remedy = f"choose one of {names} (without cache.dtype: that of the queries), or use another backend"
        reasons.append(Reason("kv_dtype", message, remedy))
    return reasons


def _size_reasons(capabilities: AttentionCapabilities, spec: AttentionSpec) -> list[Reason]:
    """Counts that are unsound in themselves have their reason already."""
    whole = spec.num_kv_heads > 0 and spec.num_heads % spec.num_kv_heads == 0
    ratio = spec.num_heads // spec.num_kv_heads if whole else 0
    tp_remedy = "choose a tensor-parallel size with such a ratio"
    facts: list[tuple[str, int, Sizes, str]] = [
        ("head_dim", spec.head_dim, capabilities.head_dims, "use a model with such heads"),
        ("block_size", spec.block_size, capabilities.block_sizes, "set cache.block_size to such a size"),
        ("gqa_ratio", ratio, capabilities.gqa_ratios, tp_remedy),
    ]
    return [
        Reason(name, f"{name}={size} is not {sizes}", f"{remedy}, or use another backend")
        for name, size, sizes, remedy in facts
        if size >= 1 and size not in sizes
    ]


def _feature_reasons(capabilities: AttentionCapabilities, spec: AttentionSpec) -> list[Reason]:
    asked = {
        Feature.SLIDING_WINDOW: f"sliding_window={spec.sliding_window}",
        Feature.SOFTCAP: f"softcap={spec.softcap}",
        Feature.SINKS: "attention sinks",
        Feature.CHUNKED_PREFILL: "prompts in pieces",
        Feature.MIXED_BATCH: "decodes and prompts in one batch",
        Feature.GRAPHS: "captured decode steps",
    }
    missing = [feature for feature in Feature if feature in spec.needs - capabilities.features]
    return [
        Reason(
            f"feature_{feature.value}",
            f"{asked[feature]} needs {feature.value}, which it does not have",
            _FEATURE_REMEDIES.get(feature, "use another backend"),
        )
        for feature in missing
    ]


def _device_reasons(capabilities: AttentionCapabilities, spec: AttentionSpec) -> list[Reason]:
    """Whether this machine has such a device is not asked here: the selector knows."""
    if spec.device.type in capabilities.devices:
        return []
    names = " or ".join(capabilities.devices)
    return [Reason("device", f"device type {spec.device.type} is not {names}", f"run on {names}")]


def _names(dtypes: Iterable[torch.dtype]) -> str:
    return ", ".join(map(_short, dtypes))


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
