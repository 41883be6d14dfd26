"""Stand-ins for attention libraries that are not here: they check every argument as the real ones do.

What they check is read from flash-attn 2.8 (csrc/flash_attn/flash_api.cpp), flash-attn 4.0.0b36 (flash_attn/cute/
interface.py), torch 2.13 (torch/nn/attention/varlen.py and aten's flash_api.cpp) and flashinfer 0.6.4 and 0.7.2
(decode.py, prefill.py). What they compute comes from kernels/reference.py.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import ModuleType
from typing import Any, TypeVar

import torch

from inference_shardformer.attention.base import AttentionBackend, AttentionSpec
from inference_shardformer.kernels import reference

HALF = (torch.float16, torch.bfloat16)
Backend = TypeVar("Backend", bound=AttentionBackend)


class Refused(RuntimeError):
    """A library would not take this argument."""


def need(holds: bool, what: str) -> None:
    if not holds:
        raise Refused(what)


def on_cpu(backend: type[Backend], module: str, stand_in: Callable[[], ModuleType]) -> type[Backend]:
    """The backend on a CPU, built over a stand-in for its library."""

    class OnCpu(backend):  # type: ignore[valid-type, misc]
        capabilities = replace(backend.capabilities, devices=("cpu",))

        def __init__(self, spec: AttentionSpec, options: Any = None) -> None:
            with installed(module, stand_in()):
                super().__init__(spec, options)

    OnCpu.__module__, OnCpu.__qualname__ = backend.__module__, backend.__qualname__
    return OnCpu


@contextmanager
def installed(name: str, module: ModuleType) -> Iterator[None]:
    """`import name` gives `module`, as long as this holds."""
    before = {part: sys.modules.get(part) for part in _parts(name)}
    sys.modules.update({part: ModuleType(part) for part in _parts(name)[:-1] if part not in sys.modules})
    sys.modules[name] = module
    try:
        yield
    finally:
        for part, old in before.items():
            if old is None:
                del sys.modules[part]
            else:
                sys.modules[part] = old


def _parts(name: str) -> list[str]:
    names = name.split(".")
    return [".".join(names[: count + 1]) for count in range(len(names))]


def made(name: str, **members: object) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(members)
    return module


def check_floats(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, max_head_dim: int = 256) -> None:
    need(q.dtype in HALF, "only fp16 and bf16")
    need(k.dtype == q.dtype == v.dtype, "query, key and value must have the same type")
    need(all(each.stride(-1) == 1 for each in (q, k, v)), "the last dimension must be contiguous")
    need(k.dim() == 4 and k.shape == v.shape, f"paged keys and values are [blocks, size, heads, dim]: {k.shape}")
    need(q.shape[-1] == k.shape[-1] <= max_head_dim, f"head dimension {q.shape[-1]}")
    need(q.shape[-1] % 8 == 0, "the head dimension must be a multiple of 8")
    need(q.shape[-2] % k.shape[-2] == 0, "key heads must divide query heads")


def check_counts(name: str, tensor: torch.Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    need(tensor.dtype == torch.int32, f"{name} must be int32")
    need(tensor.is_contiguous(), f"{name} must be contiguous")
    need(tuple(tensor.shape) == shape, f"{name} must be {shape}, is {tuple(tensor.shape)}")
    need(tensor.device == device, f"{name} must lie beside the queries")


def check_tables(tables: torch.Tensor, num_seqs: int, k: torch.Tensor, lens: torch.Tensor) -> None:
    need(tables.dtype == torch.int32 and tables.stride(-1) == 1, "block tables are int32, rows contiguous")
    need(tables.dim() == 2 and tables.shape[0] == num_seqs, f"a row of the block table for each of {num_seqs}")
    need(num_seqs > 0, "the batch size must be positive")
    need(int(lens.max()) <= tables.shape[1] * k.shape[1], "a sequence is longer than its row of the block table")
    need(int(lens.min()) >= 1, "a sequence without keys")


def check_window(window: object) -> int | None:
    """The sliding window that a causal call's edges mean."""
    need(isinstance(window, tuple) and len(window) == 2, f"window_size is a pair: {window!r}")
    left, right = window  # type: ignore[misc]
    need(right in (-1, 0, None), f"the right edge {right}")
    return None if left in (-1, None) else int(left) + 1


def check_bounds(cu_seqlens_q: torch.Tensor, max_q: object, lens: torch.Tensor, max_k: object) -> None:
    need(type(max_q) is int and type(max_k) is int, f"bounds are integers of the host: {max_q!r}, {max_k!r}")
    need(int(cu_seqlens_q.diff().max()) <= max_q, "max_seqlen_q is too small")  # type: ignore[operator]
    need(int(lens.max()) <= max_k, "max_seqlen_k is too small")  # type: ignore[operator]


def attend(q, k, v, starts, lens, tables, scale, window, softcap, sinks=None) -> torch.Tensor:
    need(isinstance(scale, float), f"the scale is {scale!r}")
    return reference.paged_attention(
        q,
        k,
        v,
        cu_seqlens_q=starts,
        seq_lens=lens,
        block_tables=tables,
        scale=scale,
        sliding_window=window,
        softcap=softcap or None,
        sinks=sinks,
    )


def check_256(k: torch.Tensor) -> None:
    need(k.shape[1] % 256 == 0, "Paged KV cache block size must be divisible by 256")


def varlen_attn(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1),
    enable_gqa=False, seqused_k=None, block_table=None, num_splits=None,
) -> torch.Tensor:  # fmt: skip
    """torch.nn.attention.varlen.varlen_attn, with a block table."""
    num_seqs = len(cu_seq_q) - 1
    need(query.dim() == 3, "packed queries are [tokens, heads, dim]")
    check_floats(query, key, value)
    check_256(key)
    need(enable_gqa or query.shape[1] == key.shape[2], "enable_gqa is off")
    check_counts("cu_seq_q", cu_seq_q, (num_seqs + 1,), query.device)
    check_counts("cu_seq_k", cu_seq_k, (num_seqs + 1,), query.device)
    check_counts("seqused_k", seqused_k, (num_seqs,), query.device)
    check_tables(block_table, num_seqs, key, seqused_k)
    check_bounds(cu_seq_q, max_q, seqused_k, max_k)
    need(torch.equal(cu_seq_k.diff(), seqused_k), "cu_seq_k are sums of seqused_k")
    need(num_splits == 1, "with a block table, contexts in several parts give wrong results")
    need(window_size[1] == 0, "only causal attention is right here")
    return attend(query, key, value, cu_seq_q, seqused_k, block_table, scale, check_window(window_size), None)


def fa2_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,
    block_table=None,
) -> torch.Tensor:  # fmt: skip
    """flash_attn.flash_attn_varlen_func of 2.8, with a block table."""
    num_seqs = len(cu_seqlens_q) - 1
    need(q.dim() == 3, "packed queries are [tokens, heads, dim]")
    check_floats(q, k, v)
    check_256(k)
    check_counts("cu_seqlens_q", cu_seqlens_q, (num_seqs + 1,), q.device)
    check_counts("cu_seqlens_k", cu_seqlens_k, (num_seqs + 1,), q.device)
    need(int(cu_seqlens_q[0]) == 0 and int(cu_seqlens_q[-1]) == len(q), "cu_seqlens_q covers the queries")
    lens = cu_seqlens_k.diff()
    check_tables(block_table, num_seqs, k, lens)
    check_bounds(cu_seqlens_q, max_seqlen_q, lens, max_seqlen_k)
    need(causal and isinstance(softcap, float), "causal, with a cap that is a number")
    window = check_window(window_size)
    return attend(q, k, v, cu_seqlens_q, lens, block_table, softmax_scale, window, softcap)


def fa2_with_kvcache(
    q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None, cache_batch_idx=None,
    cache_leftpad=None, block_table=None, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
    rotary_interleaved=True, alibi_slopes=None, num_splits=0, return_softmax_lse=False,
) -> torch.Tensor:  # fmt: skip
    """flash_attn.flash_attn_with_kvcache of 2.8, with a block table and without new keys."""
    num_seqs = len(q)
    need(q.dim() == 4 and q.shape[1] == 1, f"queries are [batch, 1, heads, dim]: {tuple(q.shape)}")
    check_floats(q, k_cache, v_cache)
    check_256(k_cache)
    check_counts("cache_seqlens", cache_seqlens, (num_seqs,), q.device)
    check_tables(block_table, num_seqs, k_cache, cache_seqlens)
    need(causal and isinstance(softcap, float) and 0 <= num_splits <= 128, "causal, a cap and a number of parts")
    starts, window = torch.arange(num_seqs + 1), check_window(window_size)
    out = attend(q[:, 0], k_cache, v_cache, starts, cache_seqlens, block_table, softmax_scale, window, softcap)
    return out.unsqueeze(1)


def fa4_varlen_func(
    q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, min_seqlen_k=None,
    seqused_q=None, seqused_k=None, gather_kv_indices=None, page_table=None, softmax_scale=None, causal=False,
    window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
    score_mod=None, score_mod_bwd=None, mask_mod=None, block_sparse_tensors=None, aux_tensors=None, aux_scalars=None,
    return_lse=False, scheduler_metadata=None, seqlen_k_per_split=None, disable_scheduler_metadata=False,
    gather_bwd_recompute_p=False, gather_bwd_token_chunk=None,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """flash_attn.cute.interface.flash_attn_varlen_func of 4.0.0b36 on Hopper, with a page table."""
    num_seqs = len(cu_seqlens_q) - 1
    need(q.dim() == 3, "packed queries are [tokens, heads, dim]")
    check_floats(q, k, v)
    need(all(each.data_ptr() % 16 == 0 for each in (q, k, v)), "tensors start at multiples of 16 bytes")
    need(all(stride % 8 == 0 for each in (q, k, v) for stride in each.stride()[:-1]), "so do their rows")
    need(cu_seqlens_k is None, "page_table is not supported with cu_seqlens_k")
    check_counts("cu_seqlens_q", cu_seqlens_q, (num_seqs + 1,), q.device)
    check_counts("seqused_k", seqused_k, (num_seqs,), q.device)
    check_tables(page_table, num_seqs, k, seqused_k)
    check_bounds(cu_seqlens_q, max_seqlen_q, seqused_k, max_seqlen_k)
    need(k.shape[1] < 64, "a block that holds a whole tile of keys is loaded with its unused rows")
    need(num_splits == 1, "SplitKV not supported on SM 9.0")
    need(causal and isinstance(softcap, float), "causal, with a cap that is a number")
    if learnable_sink is not None:
        need(tuple(learnable_sink.shape) == (q.shape[1],), "a sink for each head")
        need(learnable_sink.dtype in (*HALF, torch.float32), "the type of the sinks")
    window = check_window(window_size)
    out = attend(q, k, v, cu_seqlens_q, seqused_k, page_table, softmax_scale, window, softcap, learnable_sink)
    return out, None


def varlen_module() -> ModuleType:
    return made("torch.nn.attention.varlen", varlen_attn=varlen_attn)


def flash_attn_module() -> ModuleType:
    members = {"flash_attn_varlen_func": fa2_varlen_func, "flash_attn_with_kvcache": fa2_with_kvcache}
    return made("flash_attn", __version__="2.8.3", **members)


def flash_attn4_module() -> ModuleType:
    return made("flash_attn.cute.interface", flash_attn_varlen_func=fa4_varlen_func)
