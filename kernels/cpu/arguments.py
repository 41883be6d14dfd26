"""What the elementwise kernels take, as the structs of `src/elementwise.h`."""

from __future__ import annotations

import ctypes

import torch

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_Pointer, _Size, _Int, _Float = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float


def _fields(kind: type, names: str) -> list[tuple[str, type]]:
    return [(name, kind) for name in names.split()]


class RmsNormArgs(ctypes.Structure):
    """Arguments of `rms_norm`."""

    _fields_ = [
        *_fields(_Pointer, "out x residual weight"),
        *_fields(_Size, "rows size x_stride out_stride"),
        *_fields(_Float, "eps weight_offset"),
        *_fields(_Int, "rounds_before_weight dtype"),
    ]


class LayerNormArgs(ctypes.Structure):
    """Arguments of `layer_norm`."""

    _fields_ = [
        *_fields(_Pointer, "out x residual weight bias"),
        *_fields(_Size, "rows size x_stride out_stride"),
        *_fields(_Float, "eps"),
        *_fields(_Int, "dtype"),
    ]


class GatedArgs(ctypes.Structure):
    """Arguments of `gated`."""

    _fields_ = [
        *_fields(_Pointer, "out gate_up"),
        *_fields(_Size, "rows size in_stride out_stride"),
        *_fields(_Int, "activation dtype"),
    ]


class AddArgs(ctypes.Structure):
    """Arguments of `add`."""

    _fields_ = [*_fields(_Pointer, "out a b"), *_fields(_Size, "count"), *_fields(_Int, "dtype unused")]


class RotaryArgs(ctypes.Structure):
    """Arguments of `rotary`."""

    _fields_ = [
        *_fields(_Pointer, "q_out qkv k_cache v_cache cos sin table positions slot_mapping"),
        *_fields(_Size, "num_tokens num_heads num_kv_heads head_dim rotary_dim block_size"),
        *_fields(_Size, "qkv_stride angle_stride block_stride slot_stride head_stride"),
        *_fields(_Int, "dtype unused"),
    ]


class ArgmaxArgs(ctypes.Structure):
    """Arguments of `argmax`."""

    _fields_ = [
        *_fields(_Pointer, "x index value partial"),
        *_fields(_Size, "rows size stride"),
        *_fields(_Int, "dtype marks"),
    ]


class TopKArgs(ctypes.Structure):
    """Arguments of `topk`."""

    _fields_ = [
        *_fields(_Pointer, "x index value"),
        *_fields(_Size, "rows size stride k"),
        *_fields(_Int, "dtype unused"),
    ]
