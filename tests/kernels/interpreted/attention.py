"""Triton's paged attention against the reference in float64, in Triton's interpreter.

Not collected by its name: `test_triton_interpreted.py` runs it in a process of its own.
"""

from __future__ import annotations

import importlib
from typing import NamedTuple

import pytest
import torch
import triton_interpreter

from inference_shardformer.kernels import reference
from inference_shardformer.kernels.triton.paged_attention import PagedAttention
from inference_shardformer.kernels.triton.shapes import (
    MAX_SPLITS,
    SPLIT_TOKENS,
    AttentionShape,
    decode_tiles,
    num_splits,
)
from inference_shardformer.kernels.triton.twins import paged_attention
from inference_shardformer.kernels.triton.write_kv import write_kv

triton_interpreter.mend_bfloat16()

# Half a unit in the last place of the largest outputs (about 3), and what weights of the softmax in that type add.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
DTYPES = list(TOLERANCES)
CPU = torch.device("cpu")

Sequences = tuple[tuple[int, int], ...]  # (past tokens, query tokens), those with one query token first
BATCHES: dict[str, Sequences] = {
    "empty": (),
    "single": ((37, 1),),
    "first_token": ((0, 1),),
    "ragged_decodes": ((40, 1), (3, 1), (130, 1), (63, 1), (64, 1)),
    "ragged_prompts": ((0, 5), (0, 40), (0, 2)),
    "chunked": ((8, 8), (21, 5), (64, 30), (200, 2)),
    "block_boundaries": ((14, 1), (15, 1), (16, 1), (31, 1), (0, 15), (0, 16), (0, 17), (16, 16), (15, 17)),
    "mixed": ((20, 1), (7, 1), (0, 19), (16, 9)),
    "long": ((1500, 1), (30, 1), (1030, 33)),
}
MIXED = (*BATCHES["mixed"], (300, 7))


class Shape(NamedTuple):
    """Heads and sizes of a case."""

    num_heads: int = 6
    num_kv_heads: int = 2
    head_dim: int = 32
    block_size: int = 16


USUAL = Shape()


class Problem(NamedTuple):
    """Tensors of one case. Slots that no sequence owns hold NaN."""

    q: torch.Tensor
    k_cache: torch.Tensor  # [num_blocks, block_size, num_kv_heads, head_dim]
    v_cache: torch.Tensor
    batch: dict[str, torch.Tensor]


def make_problem(
    sequences: Sequences, dtype: torch.dtype, shape: Shape = USUAL, kv_dtype: torch.dtype | None = None
) -> Problem:
    """Random tensors over blocks in shuffled order."""
    gen = torch.Generator().manual_seed(0)
    counts = [-(-(past + new) // shape.block_size) for past, new in sequences]
    shuffled = (torch.randperm(sum(counts) + 2, generator=gen) + 1).tolist()
    tables = torch.zeros(len(sequences), max(counts, default=1), dtype=torch.int32)
    size = (sum(counts) + 3, shape.block_size, shape.num_kv_heads, shape.head_dim)
    caches = [torch.full(size, torch.nan, dtype=dtype) for _ in range(2)]
    for row, count, (past, new) in zip(tables, counts, sequences, strict=True):
        row[:count] = torch.tensor([shuffled.pop() for _ in range(count)])
        positions = torch.arange(past + new)
        for cache in caches:
            rows = torch.randn(past + new, *size[2:], generator=gen).to(dtype)
            cache[row.long()[positions // shape.block_size], positions % shape.block_size] = rows
    caches = [cache.to(kv_dtype or dtype) for cache in caches]
    num_tokens = sum(new for _, new in sequences)
    q = torch.randn(num_tokens, shape.num_heads, shape.head_dim, generator=gen).to(dtype)
    batch = {
        "cu_seqlens_q": torch.tensor([0, *(new for _, new in sequences)]).cumsum(0).int(),
        "seq_lens": torch.tensor([past + new for past, new in sequences], dtype=torch.int32),
        "block_tables": tables,
    }
    return Problem(q, *caches, batch)


def require_close(problem: Problem, **settings: object) -> None:
    settings.setdefault("scale", 1.24 * problem.q.shape[-1] ** -0.5)
    out = paged_attention(problem.q, problem.k_cache, problem.v_cache, **problem.batch, **settings)
    assert out.shape == problem.q.shape
    assert out.dtype == problem.q.dtype
    sinks = settings.pop("sinks", None)
    wide = (each.double() for each in (problem.q, problem.k_cache, problem.v_cache))
    expected = reference.paged_attention(
        *wide, **problem.batch, **settings, sinks=None if sinks is None else sinks.double()
    )
    difference = (out.double() - expected).abs().nan_to_num(nan=torch.inf)
    assert difference.numel() == 0 or difference.max() <= TOLERANCES[problem.q.dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", BATCHES)
def test_named_batches(name, dtype):
    require_close(make_problem(BATCHES[name], dtype))


@pytest.mark.parametrize(
    "shape",
    [
        Shape(4, 4),
        Shape(9, 3),
        Shape(10, 1),
        Shape(71, 1, 16),
        Shape(head_dim=7),
        Shape(2, 1, head_dim=80, block_size=5),
        Shape(2, 1, head_dim=128, block_size=1),
        Shape(2, 1, head_dim=256, block_size=32),
        Shape(head_dim=16, block_size=256),
    ],
    ids=lambda shape: "-".join(map(str, shape)),
)
def test_shapes(shape):
    require_close(make_problem(MIXED, torch.float32, shape))
    require_close(make_problem(((20, 1), (16, 9)), torch.bfloat16, shape))


@pytest.mark.parametrize("window", [1, 8, 100])
def test_sliding_window(window):
    require_close(make_problem((*MIXED, (0, 70)), torch.float32), sliding_window=window)


@pytest.mark.parametrize("cap", [0.5, 50.0])
def test_softcap(cap):
    require_close(make_problem(MIXED, torch.float32), softcap=cap)


def test_sinks():
    sinks = torch.linspace(-3, 4, 6)
    require_close(make_problem(MIXED, torch.float32), sinks=sinks)
    require_close(make_problem(MIXED, torch.float16), sinks=sinks.half(), sliding_window=20, softcap=5.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_cache_of_e4m3(dtype):
    require_close(make_problem(MIXED, dtype, kv_dtype=torch.float8_e4m3fn))


@pytest.mark.parametrize("scale", [0.0, -0.1])
def test_any_scale(scale):
    require_close(make_problem(BATCHES["mixed"], torch.float32), scale=scale)


def test_the_splits_of_a_context_are_those_of_the_device_code(monkeypatch):
    """With small splits a short context has many: as many as the host made room for, and no more than there may be."""
    launching = importlib.import_module("inference_shardformer.kernels.triton.paged_attention")
    monkeypatch.setattr(launching, "SPLIT_TOKENS", 64)
    monkeypatch.setattr("inference_shardformer.kernels.triton.shapes.SPLIT_TOKENS", 64)
    monkeypatch.setattr(launching, "MAX_SPLITS", 4)
    monkeypatch.setattr("inference_shardformer.kernels.triton.shapes.MAX_SPLITS", 4)
    for window in (None, 150):
        require_close(make_problem(((700, 1), (130, 1), (63, 1), (64, 1)), torch.float32), sliding_window=window)
    assert num_splits(701, None, 64) == 4
    assert num_splits(131, None, 64) == 3


def test_no_context_has_more_splits_than_there_is_room_for():
    shape = AttentionShape(32, 8, 128, 16, torch.bfloat16, torch.bfloat16, 0.1)
    block_n = decode_tiles(shape).block_n
    counts = {num_splits(seq_len, None, block_n) for seq_len in range(1, 1 << 17, 37)}
    assert max(counts) == MAX_SPLITS
    assert num_splits(SPLIT_TOKENS, None, block_n) == 1
    assert num_splits(1 << 20, 4096, block_n) == -(-4096 // SPLIT_TOKENS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_sequence_gets_the_same_bits_alone_and_in_company(dtype):
    problem = make_problem(MIXED, dtype)
    together = paged_attention(problem.q, problem.k_cache, problem.v_cache, **problem.batch, scale=0.2)
    starts = problem.batch["cu_seqlens_q"].tolist()
    for seq in (0, 3, 4):
        place = slice(starts[seq], starts[seq + 1])
        alone = {
            "cu_seqlens_q": torch.tensor([0, place.stop - place.start], dtype=torch.int32),
            "seq_lens": problem.batch["seq_lens"][seq : seq + 1],
            "block_tables": problem.batch["block_tables"][seq : seq + 1],
        }
        out = paged_attention(problem.q[place], problem.k_cache, problem.v_cache, **alone, scale=0.2)
        assert torch.equal(out, together[place])


def test_more_programs_share_the_splits_with_the_same_bits():
    problem = make_problem(((700, 1), (300, 1)), torch.float32)
    expected = paged_attention(problem.q, problem.k_cache, problem.v_cache, **problem.batch, scale=0.2)
    attention = PagedAttention(AttentionShape(6, 2, 32, 16, torch.float32, torch.float32, 0.2), CPU)
    batch = type("Batch", (), {**problem.batch, "num_decodes": 2})
    for num_programs in (1, 2, 5):
        workspace = attention.workspace(2, None)._replace(num_programs=num_programs)
        out = attention.run(problem.q, problem.k_cache, problem.v_cache, batch, workspace)
        assert torch.equal(out, expected)


def test_an_empty_sequence_of_a_padded_batch_gives_zeros():
    problem = make_problem(((20, 1), (7, 1)), torch.float32)
    lens = problem.batch["seq_lens"].clone()
    lens[1] = 0
    attention = PagedAttention(AttentionShape(6, 2, 32, 16, torch.float32, torch.float32, 0.2), CPU)
    batch = type("Batch", (), {**problem.batch, "seq_lens": lens, "num_decodes": 2})
    out = attention.run(problem.q, problem.k_cache, problem.v_cache, batch, attention.workspace(2, None))
    assert torch.equal(out[1], torch.zeros_like(out[1]))
    assert out[0].isfinite().all()


def test_heads_first_and_views_of_a_fused_projection():
    problem = make_problem(MIXED, torch.float32)
    expected = paged_attention(problem.q, problem.k_cache, problem.v_cache, **problem.batch, scale=0.2)
    heads_first = [each.transpose(1, 2).contiguous().transpose(1, 2) for each in problem[1:3]]
    fused = torch.cat((problem.q, torch.full_like(problem.q, torch.nan)), dim=1)
    out = paged_attention(fused[:, :6], *heads_first, **problem.batch, scale=0.2)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("kv_dtype", [None, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_write_kv_equals_its_twin(dtype, kv_dtype):
    fused = torch.randn(31, 10, 20, generator=torch.Generator().manual_seed(0)).to(dtype)
    k, v = fused[:, 6:8], fused[:, 8:]
    slots = torch.randperm(48)[:31]
    caches = [torch.zeros(3, 16, 2, 20, dtype=kv_dtype or dtype) for _ in range(4)]
    wide = [torch.zeros(3, 16, 2, 20, dtype=dtype) for _ in range(2)]
    reference.write_kv(k, v, *wide, slots)
    write_kv(k, v, *caches[:2], slots)
    for cache, right in zip(caches[:2], wide, strict=True):
        assert torch.equal(cache.float(), right.to(cache.dtype).float())
    slots[3] = -1
    write_kv(k, v, *caches[2:], slots)
    assert sum(int(token.float().any()) for token in caches[2].flatten(0, 1)) == 30
