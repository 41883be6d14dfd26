"""Cheap checks of the tensors that kernels read and write: type, place, and rows of one stride."""

from __future__ import annotations

from typing import NamedTuple

import torch

from inference_shardformer.kernels.cpu.arguments import DTYPES


class Rows(NamedTuple):
    """A tensor seen as `[num_rows, size]`, rows `stride` elements apart."""

    num_rows: int
    size: int
    stride: int


def rows_of(name: str, t: torch.Tensor) -> Rows:
    """How the rows of `t` lie. `ValueError` when the last axis is not contiguous, or rows have no common stride."""
    size = t.shape[-1]
    if t.is_contiguous():
        return Rows(t.numel() // size if size else 0, size, size)
    if t.dim() == 2 and t.stride(1) == 1:
        return Rows(t.shape[0], size, t.stride(0))
    raise ValueError(
        f"{name} of shape {tuple(t.shape)} has strides {t.stride()}; the kernel needs rows of one stride: call "
        "contiguous()"
    )


def dtype_of(name: str, t: torch.Tensor) -> int:
    """The library's number for the type of `t`. `ValueError` for a type it does not compute in, or another device."""
    code = DTYPES.get(t.dtype)
    if code is None or not t.is_cpu:
        raise ValueError(
            f"{name} is {t.dtype} on {t.device}; the kernel takes float32, bfloat16 and float16 on the CPU"
        )
    return code


def check_alike(name: str, t: torch.Tensor, like: torch.Tensor, shape: tuple[int, ...] | torch.Size) -> None:
    """`ValueError` unless `t` is contiguous, of that shape, and of the type and device of `like`."""
    if t.shape != shape or t.dtype != like.dtype or not (t.is_cpu and t.is_contiguous()):
        raise ValueError(
            f"{name} is {t.dtype} {tuple(t.shape)} on {t.device} with strides {t.stride()}; the kernel needs it "
            f"contiguous, {like.dtype} {tuple(shape)} on the CPU"
        )


def output(out: torch.Tensor | None, like: torch.Tensor, shape: tuple[int, ...] | torch.Size) -> torch.Tensor:
    """`out` when it fits, else a new tensor."""
    if out is None:
        return like.new_empty(shape)
    check_alike("out", out, like, shape)
    return out
