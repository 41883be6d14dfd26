"""What the launchers ask of a device, and of Triton's interpreter, which runs kernels on the CPU."""

from __future__ import annotations

from functools import cache

import torch

_FP8_CAPABILITY = (8, 9)  # from here on the device converts e4m3 itself


@cache
def num_processors(device: torch.device) -> int:
    """Multiprocessors of a device; one where kernels are interpreted."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@cache
def has_wgmma(device: torch.device) -> bool:
    """Whether matrix units read from shared memory, and there are 227 KiB of it: sm_90 and sm_100, not sm_120."""
    is_nvidia = device.type == "cuda" and not torch.version.hip
    return is_nvidia and (9, 0) <= torch.cuda.get_device_capability(device) < (12, 0)


@cache
def fp8_mode(dtype: torch.dtype, device: torch.device) -> int:
    """How a kernel reads a cache of this type: 0 as it is, 1 as bytes it converts itself, 2 as the device's e4m3."""
    if dtype is not torch.float8_e4m3fn:
        return 0
    is_native = device.type == "cuda" and not torch.version.hip
    return 2 if is_native and torch.cuda.get_device_capability(device) >= _FP8_CAPABILITY else 1


def as_stored(cache: torch.Tensor) -> torch.Tensor:
    """The tensor as kernels take it: e4m3 as bytes, all else as it is."""
    return cache.view(torch.uint8) if cache.dtype is torch.float8_e4m3fn else cache


def unit_stride(x: torch.Tensor) -> torch.Tensor:
    """The tensor itself where its last axis is contiguous, as kernels take it, else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()
