"""What the linear kernels take, as the structs of `src/linear.h` and `src/linear_pack.h`."""

from __future__ import annotations

import ctypes

import torch

from inference_shardformer.kernels.cpu.arguments import DTYPES

WEIGHT_DTYPES = {**DTYPES, torch.int8: 3}
COMPACT_BFLOAT16 = 4

_Pointer, _Size, _Int, _Float = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float


def _fields(kind: type, names: str) -> list[tuple[str, type]]:
    return [(name, kind) for name in names.split()]


class LinearArgs(ctypes.Structure):
    """Arguments of `linear`."""

    _fields_ = [
        *_fields(_Pointer, "x weight scales bias residual out workspace norm_weight"),
        *_fields(_Size, "m n k x_stride residual_stride out_stride group"),
        *_fields(_Int, "weight_dtype activation_dtype out_dtype segments epilogue norm_rounds"),
        *_fields(_Float, "norm_eps norm_offset"),
        *_fields(_Int, "stage unused"),
    ]


class PackArgs(ctypes.Structure):
    """Arguments of `linear_pack`, `linear_unpack`, `linear_quantize` and `linear_dequantize`."""

    _fields_ = [
        *_fields(_Pointer, "packed scales plain"),
        *_fields(_Size, "n k row column rows columns stride group"),
        *_fields(_Int, "dtype segments"),
    ]


class CompactArgs(ctypes.Structure):
    """Arguments of `linear_compress` and `linear_expand`; the struct of `src/compact.h`."""

    _fields_ = [
        *_fields(_Pointer, "plain compact exceptions needed"),
        *_fields(_Size, "n k capacity"),
        *_fields(_Int, "segments unused"),
    ]


class PackedEmbeddingArgs(ctypes.Structure):
    """Arguments of `packed_embedding`."""

    _fields_ = [
        *_fields(_Pointer, "packed ids out"),
        *_fields(_Size, "m n k out_stride first"),
        *_fields(_Int, "dtype unused"),
    ]
