"""What several backends demand of a spec, as reasons."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from inference_shardformer.attention.base import AttentionSpec, Reason

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def shape_reasons(spec: AttentionSpec) -> list[Reason]:
    """Reasons against counts that no backend can serve."""
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
    if spec.num_kv_heads > 0 and spec.num_heads % spec.num_kv_heads:
        reasons.append(
            Reason(
                "head_counts",
                f"num_heads={spec.num_heads} is not a multiple of num_kv_heads={spec.num_kv_heads}",
                "choose a tensor-parallel size that gives each rank whole groups of query heads",
            )
        )
    return reasons


def dtype_reasons(spec: AttentionSpec, supported: Sequence[torch.dtype] = FLOAT_DTYPES) -> list[Reason]:
    """A reason if the type of queries, keys and values is not among `supported`."""
    if spec.dtype in supported:
        return []
    names = ", ".join(_short(dtype) for dtype in supported)
    return [Reason("dtype", f"dtype {_short(spec.dtype)} is not among {names}", f"choose one of {names}")]


def device_reasons(spec: AttentionSpec, supported: Sequence[str] = ("cpu", "cuda")) -> list[Reason]:
    """A reason if the device's type is not among `supported`, or if this process sees no such device."""
    device = spec.device
    if device.type not in supported:
        names = " or ".join(supported)
        return [Reason("device", f"device type {device.type} is not {names}", f"run on {names}")]
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        message = f"device {device} does not exist, torch sees {torch.cuda.device_count()} CUDA devices"
        return [Reason("device_missing", message, "choose device=cpu, or start on a machine whose GPU torch can see")]
    return []


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
