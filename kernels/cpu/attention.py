"""Native paged attention: a shape bound once, a plan made once a step, one call a layer."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import NamedTuple

import torch

from inference_shardformer.kernels.cpu.library import native

MAX_HEAD_DIM = 256

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_POINTER, _INT64, _INT32, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float


class _Arguments(ctypes.Structure):
    """PagedAttentionArgs of attention.h."""

    _fields_ = (
        *((name, _POINTER) for name in ("q", "k", "v", "out", "sinks")),
        *((name, _INT64) for name in ("q_stride", "out_stride")),
        *((f"{which}_{step}_stride", _INT64) for which in "kv" for step in ("block", "slot", "head")),
        *((name, _POINTER) for name in ("cu_seqlens_q", "seq_lens", "block_tables")),
        ("block_table_stride", _INT64),
        *((name, _POINTER) for name in ("plan", "scratch")),
        *((name, _INT32) for name in ("scratch_threads", "dtype", "num_seqs", "num_heads", "num_kv_heads")),
        *((name, _INT32) for name in ("head_dim", "block_size", "sliding_window")),
        *((name, _FLOAT) for name in ("scale", "softcap")),
    )


class _Sizes(ctypes.Structure):
    """AttentionSizes of attention.h."""

    _fields_ = (("plan", _INT64), ("scratch", _INT64))


class _WriteArguments(ctypes.Structure):
    """WriteKvArgs of attention.h."""

    _fields_ = (
        *((name, _POINTER) for name in ("k", "v", "k_cache", "v_cache", "slot_mapping")),
        *((name, _INT64) for name in ("k_stride", "v_stride")),
        *((f"{which}_{step}_stride", _INT64) for which in "kv" for step in ("block", "slot", "head")),
        ("num_tokens", _INT64),
        *((name, _INT32) for name in ("num_kv_heads", "head_dim", "block_size", "element_size")),
    )


class AttentionShape(NamedTuple):
    """What stays the same over the steps of a model; head counts are those of this rank."""

    num_heads: int
    num_kv_heads: int
    head_dim: int  # at most MAX_HEAD_DIM
    block_size: int
    dtype: torch.dtype  # of queries, keys, values and outputs: fp32, bf16 or fp16
    scale: float
    sliding_window: int | None = None
    softcap: float | None = None


class PlannedAttention:
    """The work of one step, cut into items; every layer of the step runs it."""

    def __init__(self, arguments: _Arguments, tensors: tuple[torch.Tensor, ...]) -> None:
        self._arguments = arguments
        self._tensors = tensors  # what the arguments point to
        self._room = _Sizes()
        self._kept: tuple[torch.Tensor, ...] = ()  # plan and scratch
        self._run = native().entry("paged_attention", _Arguments)

    def is_over(self, tensors: tuple[torch.Tensor, ...]) -> bool:
        """Whether it was planned over these very tensors."""
        return all(mine is its for mine, its in zip(self._tensors, tensors, strict=True))

    def fill(self, plan: Callable[..., int], scratch_of: Callable[[int], torch.Tensor]) -> None:
        """Cut into items what the tensors hold now."""
        arguments, room = self._arguments, self._room
        arguments.scratch_threads = torch.get_num_threads()
        while plan(arguments, room):
            self._kept = torch.empty(2 * room.plan, dtype=torch.uint8), scratch_of(room.scratch)
            arguments.plan, arguments.scratch = (memory.data_ptr() for memory in self._kept)
            room.plan, room.scratch = (memory.numel() for memory in self._kept)

    @property
    def address(self) -> int:
        """Of the step's PagedAttentionArgs, for kernels that run attention inside; valid as long as this lives."""
        return ctypes.addressof(self._arguments)

    def run(
        self,
        q: torch.Tensor,  # [num_tokens, num_heads, head_dim], may be a view into a fused projection
        keys: torch.Tensor,  # of one layer, as [num_blocks, block_size, num_kv_heads, head_dim] in any strides
        values: torch.Tensor,
        sinks: torch.Tensor | None = None,  # [num_heads]
    ) -> torch.Tensor:
        """Attend to the keys and values of one layer: `[num_tokens, num_heads, head_dim]`."""
        if q.stride(2) != 1 or q.stride(1) != q.shape[2]:
            q = q.contiguous()
        out = torch.empty(q.shape, dtype=q.dtype)
        wide_sinks = None if sinks is None else sinks.to(torch.float32).contiguous()
        arguments = self._arguments
        arguments.q, arguments.q_stride = q.data_ptr(), q.stride(0)
        arguments.k, arguments.v, arguments.out = keys.data_ptr(), values.data_ptr(), out.data_ptr()
        arguments.k_block_stride, arguments.k_slot_stride, arguments.k_head_stride, _ = keys.stride()
        arguments.v_block_stride, arguments.v_slot_stride, arguments.v_head_stride, _ = values.stride()
        arguments.sinks = None if wide_sinks is None else wide_sinks.data_ptr()
        self._run(arguments, torch.get_num_threads())
        return out


class PagedAttention:
    """Paged, ragged, causal attention of one shape, in memory that its plans share.

    One plan runs at a time: the next step may be planned before a plan is done with, but not run beside it. A step over
    the very tensors of the step before, whose contents are gone, takes over the plan of that, too. Raises
    `NativeUnavailableError` where there is no native library.
    """

    def __init__(self, shape: AttentionShape) -> None:
        self._template = _Arguments(
            dtype=_DTYPES[shape.dtype],
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            block_size=shape.block_size,
            sliding_window=shape.sliding_window or 0,
            scale=shape.scale,
            softcap=shape.softcap or 0.0,
            out_stride=shape.num_heads * shape.head_dim,
        )
        arguments, sizes = ctypes.POINTER(_Arguments), ctypes.POINTER(_Sizes)
        self._plan = native().function("isf_paged_attention_plan", argtypes=(arguments, sizes), restype=ctypes.c_int32)
        self._scratch = torch.empty(0, dtype=torch.uint8)
        self._last: PlannedAttention | None = None

    def plan(
        self,
        *,
        cu_seqlens_q: torch.Tensor,  # int32 [num_seqs + 1]
        seq_lens: torch.Tensor,  # int32 [num_seqs]
        block_tables: torch.Tensor,  # int32 [num_seqs, max_blocks]
    ) -> PlannedAttention:
        """Cut a step into work items."""
        tensors = cu_seqlens_q, seq_lens, block_tables
        planned = self._last
        if planned is None or not planned.is_over(tensors):
            planned = self._last = self._planned(*tensors)
        planned.fill(self._plan, self._scratch_of)
        return planned

    def _planned(
        self, cu_seqlens_q: torch.Tensor, seq_lens: torch.Tensor, block_tables: torch.Tensor
    ) -> PlannedAttention:
        arguments = _Arguments.from_buffer_copy(self._template)
        block_tables = block_tables if block_tables.stride(-1) == 1 else block_tables.contiguous()
        arguments.cu_seqlens_q = cu_seqlens_q.data_ptr()
        arguments.seq_lens = seq_lens.data_ptr()
        arguments.block_tables, arguments.block_table_stride = block_tables.data_ptr(), block_tables.stride(0)
        arguments.num_seqs = len(seq_lens)
        return PlannedAttention(arguments, (cu_seqlens_q, seq_lens, block_tables))

    def _scratch_of(self, num_bytes: int) -> torch.Tensor:
        if self._scratch.numel() < num_bytes:
            self._scratch = torch.empty(num_bytes, dtype=torch.uint8)
        return self._scratch


def paged_attention(
    q: torch.Tensor,  # [num_tokens, num_heads, head_dim]
    k_cache: torch.Tensor,  # [num_blocks, block_size, num_kv_heads, head_dim]
    v_cache: torch.Tensor,  # [num_blocks, block_size, num_kv_heads, head_dim]
    *,
    cu_seqlens_q: torch.Tensor,  # int32 [num_seqs + 1]
    seq_lens: torch.Tensor,  # int32 [num_seqs]
    block_tables: torch.Tensor,  # int32 [num_seqs, max_blocks]
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,  # [num_heads]
) -> torch.Tensor:
    """Plan and run one layer; the twin of `reference.paged_attention`."""
    _, block_size, num_kv_heads, head_dim = k_cache.shape
    shape = AttentionShape(q.shape[1], num_kv_heads, head_dim, block_size, q.dtype, scale, sliding_window, softcap)
    planned = PagedAttention(shape).plan(cu_seqlens_q=cu_seqlens_q, seq_lens=seq_lens, block_tables=block_tables)
    return planned.run(q, k_cache, v_cache, sinks)


def write_kv(
    k: torch.Tensor,  # [num_tokens, num_kv_heads, head_dim]
    v: torch.Tensor,  # [num_tokens, num_kv_heads, head_dim]
    k_cache: torch.Tensor,  # [num_blocks, block_size, num_kv_heads, head_dim] in any strides, changed in place
    v_cache: torch.Tensor,  # [num_blocks, block_size, num_kv_heads, head_dim] in any strides, changed in place
    slot_mapping: torch.Tensor,  # int64 [num_tokens], slot = block_id * block_size + offset
) -> None:
    """Store each token's key and value at its slot; the twin of `reference.write_kv`."""
    k, v = (x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous() for x in (k, v))
    k_block, k_slot, k_head, _ = k_cache.stride()
    v_block, v_slot, v_head, _ = v_cache.stride()
    num_tokens, num_kv_heads, head_dim = k.shape
    arguments = _WriteArguments(
        k.data_ptr(),
        v.data_ptr(),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        slot_mapping.data_ptr(),
        k.stride(0),
        v.stride(0),
        k_block,
        k_slot,
        k_head,
        v_block,
        v_slot,
        v_head,
        num_tokens,
        num_kv_heads,
        head_dim,
        k_cache.shape[1],
        k.element_size(),
    )
    native().entry("write_kv", _WriteArguments)(arguments, torch.get_num_threads())
