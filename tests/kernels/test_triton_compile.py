"""Every Triton kernel becomes a cubin for sm_80 and sm_90 at the shapes of common models, no register spilled."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch

pytest.importorskip("triton")

import triton
from ahead_of_time import Resources, compile_for

from inference_shardformer.kernels.triton.activation_kernel import gated_kernel
from inference_shardformer.kernels.triton.decode_kernel import combine_kernel, decode_kernel
from inference_shardformer.kernels.triton.experts_kernel import experts_kernel
from inference_shardformer.kernels.triton.fp8_rows_kernel import fp8_rows_kernel
from inference_shardformer.kernels.triton.norm_kernel import rms_norm_kernel
from inference_shardformer.kernels.triton.prefill_kernel import prefill_kernel
from inference_shardformer.kernels.triton.rotary_kernel import rotary_kernel
from inference_shardformer.kernels.triton.sampling_kernel import sample_kernel
from inference_shardformer.kernels.triton.shapes import (
    MAX_SPLITS,
    SPLIT_TOKENS,
    AttentionShape,
    decode_tiles,
    prefill_tiles,
)
from inference_shardformer.kernels.triton.write_kernel import write_kernel

# The compiler of torch 2.5 spills a few registers.
STACK_LIMIT = 0 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 2) else 256
SHARED_LIMITS = {80: 163 << 10, 90: 227 << 10}
_LENGTHS = ("tables_ptr", "starts_ptr", "lens_ptr", "ends_ptr", "first_seq", "num_seqs", "num_heads")
_FLOATS = ("scale", "softcap", "eps")
_KINDS = {"partial_ptr": "*fp32", "lse_ptr": "*fp32", "temperatures_ptr": "*fp64", "top_ps_ptr": "*fp64"}
_KINDS |= {"uniforms_ptr": "*fp64", "ids_ptr": "*i64", "slots_ptr": "*i64", "rows_ptr": "*i64", "logits_ptr": "*fp32"}
_KINDS |= {"cos_ptr": "*fp32", "sin_ptr": "*fp32", "top_ks_ptr": "*fp64", "weights_ptr": "*i64", "scores_ptr": "*fp32"}
_KINDS |= {"codes_ptr": "*u8", "scales_ptr": "*fp32"}
_CACHES = ("k_ptr", "v_ptr", "k_cache_ptr", "v_cache_ptr")


class Kernel(NamedTuple):
    """A kernel, its constants and how it is launched."""

    function: triton.JITFunction
    constants: dict[str, Any]
    options: dict[str, int]

    def types(self) -> dict[str, str]:
        """Of the run-time arguments, in bf16 with a cache of bytes where there is e4m3."""
        names = [param.name for param in self.function.params if param.name not in self.constants]
        cache = "*u8" if self.constants.get("FP8") else "*bf16"
        kept = dict.fromkeys(_CACHES, cache) if self.function is not write_kernel else {}
        return {name: kept.get(name) or _type_of(name, cache) for name in names}


def _type_of(name: str, cache: str) -> str:
    if name in ("k_cache_ptr", "v_cache_ptr"):
        return cache
    if name in _FLOATS:
        return "fp32"
    if name.endswith("_ptr"):
        return _KINDS.get(name, "*i32" if name in _LENGTHS else "*bf16")
    return "i32"


def _attention(head_dim: int, *, capability: int, group: int = 4, fp8: int = 0, window: int = 0) -> list[Kernel]:
    kv_dtype = torch.float8_e4m3fn if fp8 else torch.bfloat16
    shape = AttentionShape(8 * group, 8, head_dim, 16, torch.bfloat16, kv_dtype, 0.1)
    shared = {"GROUP": group, "HEAD_DIM": head_dim, "HEAD_PAD": shape.head_pad, "BLOCK_SIZE": 16, "WINDOW": window}
    shared |= {"HAS_SOFTCAP": False, "FP8": fp8}
    prompts, decodes = prefill_tiles(shape, has_wgmma=capability >= 90), decode_tiles(shape)
    splits = {"SPLIT_TOKENS": SPLIT_TOKENS, "MAX_SPLITS": MAX_SPLITS}
    kernels = []
    for function, tiles, more in ((prefill_kernel, prompts, {"HAS_SINKS": False}), (decode_kernel, decodes, splits)):
        sizes = {"GROUP_TILE": tiles.group_tile, "BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n}
        options = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
        kernels.append(Kernel(function, shared | sizes | more, options))
    return kernels


def _fp8_rows(size: int, padded: int) -> dict[str, Any]:
    return {"SIZE": size, "WIDTH": size, "WIDTH_PAD": padded, "SMALLEST": 2.0**-100, "LARGEST": 448.0}


def _others() -> dict[str, Kernel]:
    combine = {"HEAD_DIM": 128, "HEAD_PAD": 128, "BLOCK_N": 64, "SPLIT_TOKENS": SPLIT_TOKENS, "MAX_SPLITS": MAX_SPLITS}
    heads = {"NUM_HEADS": 32, "NUM_KV_HEADS": 8, "HEAD_TILE": 16, "HEAD_DIM": 128, "HALF": 64, "HALF_PAD": 64}
    write = {"NUM_HEADS": 8, "HEADS_PAD": 8, "HEAD_DIM": 128, "HEAD_PAD": 128, "BLOCK_SIZE": 16}
    norm = {"SIZE": 4096, "SIZE_PAD": 4096, "WEIGHT_OFFSET": 0.0, "ROUNDS_BEFORE_WEIGHT": True, "HAS_RESIDUAL": True}
    rotary = heads | {"REST_PAD": 0, "BLOCK_SIZE": 16, "HAS_ROWS": True}
    experts = {"NUM_EXPERTS": 8, "EXPERTS_PAD": 8, "OUT_FEATURES": 28672, "IN_FEATURES": 4096}
    experts |= {"ALIGNED": True, "BLOCK_N": 64, "BLOCK_K": 64}
    return {
        "combine": Kernel(combine_kernel, combine | {"WINDOW": 0, "HAS_SINKS": False}, {"num_warps": 4}),
        "rotary": Kernel(rotary_kernel, rotary | {"FP8": False}, {}),
        "rotary_fp8": Kernel(rotary_kernel, rotary | {"FP8": True}, {}),
        "write": Kernel(write_kernel, write | {"FP8": False}, {}),
        "write_fp8": Kernel(write_kernel, write | {"FP8": True}, {}),
        "norm": Kernel(rms_norm_kernel, norm, {"num_warps": 8}),
        "silu": Kernel(gated_kernel, {"SIZE": 14336, "BLOCK": 1024, "IS_GELU": False}, {}),
        "gelu": Kernel(gated_kernel, {"SIZE": 14336, "BLOCK": 1024, "IS_GELU": True}, {}),
        "experts_decode": Kernel(experts_kernel, experts | {"BLOCK_M": 16}, {"num_warps": 4}),
        "experts_prefill": Kernel(experts_kernel, experts | {"BLOCK_M": 64}, {"num_warps": 4}),
        "fp8_rows": Kernel(fp8_rows_kernel, _fp8_rows(4096, 4096), {"num_warps": 8}),
        "fp8_long_rows": Kernel(fp8_rows_kernel, _fp8_rows(14336, 16384), {"num_warps": 16}),
        "sample": Kernel(sample_kernel, {"VOCAB": 128256, "BLOCK": 4096}, {"num_warps": 32}),
    }


def _compile(kernel: Kernel, capability: int, label: str, folder) -> Resources:
    found = compile_for(
        kernel.function, kernel.types(), kernel.constants, capability=capability, folder=folder, **kernel.options
    )
    print(f"{label} sm_{capability}: {found}")
    assert found.stack_bytes <= STACK_LIMIT, found
    assert found.shared_bytes <= SHARED_LIMITS[capability], found
    return found


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    """Nothing is found compiled, and nothing stays; what Triton warns of is its own affair."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # as it is where nobody asks, which some versions warn of


ATTENTION = {
    "head_dim_128": {"head_dim": 128},
    "head_dim_64": {"head_dim": 64},
    "head_dim_256_window": {"head_dim": 256, "window": 4096, "group": 2},
    "e4m3": {"head_dim": 128, "fp8": 1},
    "e4m3_by_the_device": {"head_dim": 128, "fp8": 2},
}


@pytest.mark.parametrize("capability", SHARED_LIMITS)
@pytest.mark.parametrize("name", ATTENTION)
def test_attention(name, capability, tmp_path):
    if ATTENTION[name].get("fp8") == 2 and capability < 89:
        pytest.skip("sm_80 converts no e4m3 itself; `e4m3` is its kernel")
    prefill, decode = _attention(**ATTENTION[name], capability=capability)
    found = _compile(prefill, capability, f"prefill {name}", tmp_path)
    assert found.instructions == ("wgmma" if capability == 90 else "mma")
    if capability == 80:
        assert found.shared_bytes <= 99 << 10  # also what sm_86, sm_89 and sm_120 have
    assert _compile(decode, capability, f"decode {name}", tmp_path).instructions == "mma"


@pytest.mark.parametrize("capability", SHARED_LIMITS)
@pytest.mark.parametrize("name", _others())
def test_the_others(name, capability, tmp_path):
    _compile(_others()[name], capability, name, tmp_path)
