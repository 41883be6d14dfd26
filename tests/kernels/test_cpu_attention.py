"""Native paged attention against the reference in float64, at every instruction-set level of this machine."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from inference_shardformer.kernels import reference
from inference_shardformer.kernels.cpu.attention import AttentionShape, PagedAttention, paged_attention, write_kv

pytestmark = pytest.mark.usefixtures("isa_level")

# Half a unit in the last place of the largest outputs (about 3), and what bf16 weights of the softmax add.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
DTYPES = list(TOLERANCES)

Sequences = tuple[tuple[int, int], ...]  # (past tokens, query tokens)
BATCHES: dict[str, Sequences] = {
    "empty": (),
    "single": ((37, 1),),
    "first_token": ((0, 1),),
    "ragged": ((40, 1), (3, 1), (130, 1), (0, 1), (299, 1), (63, 1), (64, 1)),
    "prompt": ((0, 150),),
    "chunked": ((8, 8), (21, 5), (64, 30), (700, 2)),
    "block_boundaries": ((14, 1), (15, 1), (16, 1), (31, 1), (0, 15), (0, 16), (0, 17), (16, 16), (15, 17)),
    "mixed": ((20, 1), (7, 1), (0, 19), (16, 9), (48, 16)),
    "long": ((5000, 1), (30, 1), (2050, 33)),
}


class Shape(NamedTuple):
    """Heads and sizes of a case."""

    num_heads: int = 6
    num_kv_heads: int = 2
    head_dim: int = 64
    block_size: int = 16


USUAL = Shape()


class Problem(NamedTuple):
    """Tensors of one case. Slots that no sequence owns hold NaN."""

    q: torch.Tensor
    k_cache: torch.Tensor  # [num_blocks, block_size, num_kv_heads, head_dim]
    v_cache: torch.Tensor
    batch: dict[str, torch.Tensor]

    def expected(self, **settings: object) -> torch.Tensor:
        """The reference in float64, on the same rounded inputs."""
        wide = (each.double() for each in (self.q, self.k_cache, self.v_cache))
        sinks = settings.pop("sinks", None)
        return reference.paged_attention(
            *wide, **self.batch, **settings, sinks=None if sinks is None else sinks.double()
        )

    def alone(self, seq: int) -> tuple[Problem, slice]:
        """One sequence of the batch, and its place in the packed tokens."""
        start, end = self.batch["cu_seqlens_q"][seq : seq + 2].tolist()
        batch = {
            "cu_seqlens_q": torch.tensor([0, end - start], dtype=torch.int32),
            "seq_lens": self.batch["seq_lens"][seq : seq + 1].clone(),
            "block_tables": self.batch["block_tables"][seq : seq + 1].clone(),
        }
        return self._replace(q=self.q[start:end], batch=batch), slice(start, end)


def make_problem(
    sequences: Sequences, dtype: torch.dtype, shape: Shape = USUAL, *, heads_first: bool = False
) -> Problem:
    """Random tensors over blocks in shuffled order."""
    gen = torch.Generator().manual_seed(0)
    counts = [-(-(past + new) // shape.block_size) for past, new in sequences]
    shuffled = (torch.randperm(sum(counts) + 2, generator=gen) + 1).tolist()
    tables = torch.zeros(len(sequences), max(counts, default=1), dtype=torch.int32)
    size = (sum(counts) + 3, shape.block_size, shape.num_kv_heads, shape.head_dim)
    caches = [torch.full(size, torch.nan, dtype=dtype) for _ in range(2)]
    if heads_first:
        caches = [cache.transpose(1, 2).contiguous().transpose(1, 2) for cache in caches]
    for row, count, (past, new) in zip(tables, counts, sequences, strict=True):
        row[:count] = torch.tensor([shuffled.pop() for _ in range(count)])
        positions = torch.arange(past + new)
        for cache in caches:
            rows = torch.randn(past + new, *size[2:], generator=gen).to(dtype)
            cache[row.long()[positions // shape.block_size], positions % shape.block_size] = rows
    num_tokens = sum(new for _, new in sequences)
    q = torch.randn(num_tokens, shape.num_heads, shape.head_dim, generator=gen).to(dtype)
    batch = {
        "cu_seqlens_q": torch.tensor([0, *(new for _, new in sequences)]).cumsum(0).int(),
        "seq_lens": torch.tensor([past + new for past, new in sequences], dtype=torch.int32),
        "block_tables": tables,
    }
    return Problem(q, *caches, batch)


def attend(problem: Problem, **settings: object) -> torch.Tensor:
    settings.setdefault("scale", 1.24 * problem.q.shape[-1] ** -0.5)
    return paged_attention(problem.q, problem.k_cache, problem.v_cache, **problem.batch, **settings)


def require_close(problem: Problem, **settings: object) -> None:
    settings.setdefault("scale", 1.24 * problem.q.shape[-1] ** -0.5)
    out = attend(problem, **settings)
    assert out.shape == problem.q.shape
    assert out.dtype == problem.q.dtype
    difference = (out.double() - problem.expected(**settings)).abs().nan_to_num(nan=torch.inf)
    assert difference.numel() == 0 or difference.max() <= TOLERANCES[problem.q.dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", BATCHES)
def test_named_batches(name, dtype):
    require_close(make_problem(BATCHES[name], dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        Shape(4, 4),
        Shape(9, 3),
        Shape(8, 2),
        Shape(16, 2),
        Shape(10, 1),
        Shape(150, 1, 16),
        Shape(head_dim=7),
        Shape(head_dim=80, block_size=5),
        Shape(head_dim=128, block_size=1),
        Shape(head_dim=256, block_size=32),
        Shape(head_dim=32, block_size=256),
    ],
    ids=lambda shape: "-".join(map(str, shape)),
)
def test_shapes(shape, dtype):
    require_close(make_problem(BATCHES["mixed"] + ((130, 1), (100, 50)), dtype, shape))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [1, 8, 100])
def test_sliding_window(window, dtype):
    require_close(make_problem(BATCHES["ragged"] + BATCHES["chunked"], dtype), sliding_window=window)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cap", [0.5, 2.0, 50.0])
def test_softcap(cap, dtype):
    require_close(make_problem(BATCHES["mixed"] + BATCHES["ragged"], dtype), softcap=cap)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sinks(dtype):
    problem = make_problem(BATCHES["mixed"] + BATCHES["ragged"], dtype)
    sinks = torch.linspace(-3, 4, 6).to(dtype)
    require_close(problem, sinks=sinks)
    require_close(problem, sinks=sinks, sliding_window=20, softcap=5.0)


@pytest.mark.parametrize("scale", [0.0, -0.1, 0.7])
def test_any_scale(scale):
    require_close(make_problem(BATCHES["mixed"], torch.float32), scale=scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_heads_first_and_tokens_first_give_the_same_bits(dtype):
    tokens_first = make_problem(BATCHES["mixed"] + BATCHES["ragged"], dtype)
    heads_first = make_problem(BATCHES["mixed"] + BATCHES["ragged"], dtype, heads_first=True)
    assert heads_first.k_cache.stride() != tokens_first.k_cache.stride()
    assert torch.equal(attend(heads_first), attend(tokens_first))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_sequence_gets_the_same_bits_alone_in_company_and_on_any_number_of_threads(dtype):
    problem = make_problem(BATCHES["mixed"] + BATCHES["long"] + BATCHES["ragged"], dtype)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = attend(problem)
        for threads in (2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(attend(problem), expected)
            for seq in (0, 3, 5, 7, 12):
                alone, place = problem.alone(seq)
                assert torch.equal(attend(alone), expected[place])
    finally:
        torch.set_num_threads(before)


def test_plans_are_used_again_and_do_not_disturb_each_other():
    first, second = (make_problem(BATCHES[name], torch.float32) for name in ("mixed", "long"))
    attention = PagedAttention(AttentionShape(6, 2, 64, 16, torch.float32, 0.125))
    plans = [attention.plan(**each.batch) for each in (first, second)]
    for _ in range(3):
        for plan, problem in zip(plans, (first, second), strict=True):
            out = plan.run(problem.q, problem.k_cache, problem.v_cache)
            assert (out - problem.expected(scale=0.125)).abs().max() < TOLERANCES[torch.float32]


def test_a_step_over_the_same_tensors_is_planned_anew_in_place():
    """Shorter, longer, and so long that the first plan has no room for it; a plan of other tensors in between."""
    stages = [make_problem(((past, 1), (past // 3, 1)), torch.float32) for past in (900, 30, 6000)]
    longest, other = stages[-1], make_problem(BATCHES["mixed"], torch.float32)
    shape = AttentionShape(USUAL.num_heads, USUAL.num_kv_heads, USUAL.head_dim, USUAL.block_size, torch.float32, 0.125)
    attention = PagedAttention(shape)
    tensors = {name: each.clone() for name, each in longest.batch.items()}
    plans = []
    for stage in stages:
        tensors["seq_lens"].copy_(stage.batch["seq_lens"])
        planned = attention.plan(**tensors)
        plans.append(planned)
        found = planned.run(longest.q, longest.k_cache, longest.v_cache)
        expected = longest._replace(batch=tensors).expected(scale=0.125)
        assert (found - expected).abs().max() < TOLERANCES[torch.float32]
    assert plans[0] is plans[1] is plans[2]
    assert attention.plan(**other.batch) is not planned
    assert attention.plan(**tensors) is not planned


def test_queries_may_be_views_of_any_strides():
    problem = make_problem(BATCHES["mixed"], torch.bfloat16)
    expected = attend(problem)
    fused = torch.cat((problem.q, torch.full_like(problem.q, torch.nan)), dim=1)
    assert torch.equal(attend(problem._replace(q=fused[:, :6])), expected)
    turned = problem.q.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(attend(problem._replace(q=turned)), expected)


@pytest.mark.parametrize("heads_first", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_write_kv_equals_its_twin(dtype, heads_first):
    problem = make_problem(((40, 1), (0, 30)), dtype, heads_first=heads_first)
    fused = torch.randn(31, 10, 64).to(dtype)
    k, v = fused[:, 6:8], fused[:, 8:]
    slots = torch.randperm(problem.k_cache.shape[0] * 16)[:31]
    expected = [cache.clone() for cache in problem[1:3]]
    reference.write_kv(k, v, *expected, slots)
    write_kv(k, v, *problem[1:3], slots)
    for cache, right in zip(problem[1:3], expected, strict=True):
        assert torch.equal(cache.view(torch.int16), right.view(torch.int16)) or torch.allclose(
            cache, right, rtol=0, atol=0, equal_nan=True
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_scores_far_apart(dtype):
    require_close(make_problem(BATCHES["ragged"] + BATCHES["long"], dtype), scale=8.0)
