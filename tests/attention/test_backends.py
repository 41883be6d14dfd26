"""Every backend times every named batch against the dense oracle."""

from __future__ import annotations

import pytest
import torch
from attention_batches import CASES, TOLERANCES, Case, PagedProblem, dense_attention, make_problem
from torch.nn.attention import SDPBackend, sdpa_kernel

from inference_shardformer.attention.base import AttentionBackend, AttentionMetadata
from inference_shardformer.attention.reference import ReferenceAttention
from inference_shardformer.attention.sdpa import SdpaAttention
from inference_shardformer.attention.sdpa_plan import LIMITS, GroupLimits

BACKENDS = {"sdpa": SdpaAttention, "reference": ReferenceAttention}
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


@pytest.fixture(params=BACKENDS)
def backend_class(request: pytest.FixtureRequest) -> type[AttentionBackend]:
    return BACKENDS[request.param]


def assert_close(out: torch.Tensor, problem: PagedProblem, tolerance: float | None = None) -> None:
    assert out.shape == problem.q.shape
    assert out.dtype == problem.q.dtype
    allowed = TOLERANCES[out.dtype] if tolerance is None else tolerance
    torch.testing.assert_close(out.double().cpu(), dense_attention(problem), rtol=0, atol=allowed)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("name", CASES)
def test_equals_dense_attention(
    name: str, dtype: torch.dtype, device: str, backend_class: type[AttentionBackend]
) -> None:
    problem = make_problem(CASES[name], dtype, device=device)
    assert backend_class.reasons(problem.spec) == []
    assert_close(problem.run(backend_class(problem.spec)), problem)


def test_one_plan_serves_every_layer(backend_class: type[AttentionBackend]) -> None:
    problem = make_problem(CASES["mixed"], torch.float32)
    backend, layer = backend_class(problem.spec), problem.kv_cache.layer(0)
    meta = backend.plan(problem.batch, problem.kv_cache)
    backend.write(problem.k, problem.v, layer, meta)
    first = backend.attend(problem.q, layer, meta)
    layer.values.neg_()
    torch.testing.assert_close(backend.attend(problem.q, layer, meta), -first)


def test_attend_leaves_queries_and_cache_alone(backend_class: type[AttentionBackend]) -> None:
    problem = make_problem(CASES["mixed"], torch.float32)
    backend, layer = backend_class(problem.spec), problem.kv_cache.layer(0)
    meta = backend.plan(problem.batch, problem.kv_cache)
    backend.write(problem.k, problem.v, layer, meta)
    before = [tensor.clone() for tensor in (problem.q, *layer)]
    backend.attend(problem.q, layer, meta)
    for old, new in zip(before, (problem.q, *layer), strict=True):
        torch.testing.assert_close(old, new, rtol=0, atol=0, equal_nan=True)


def test_queries_may_be_a_slice_of_a_fused_projection(backend_class: type[AttentionBackend]) -> None:
    problem = make_problem(CASES["mixed"], torch.float32)
    problem.q = torch.cat([problem.q, problem.q], dim=1)[:, : problem.spec.num_heads]
    assert not problem.q.is_contiguous()
    assert_close(problem.run(backend_class(problem.spec)), problem)


def test_serves_inside_and_outside_of_inference_mode(backend_class: type[AttentionBackend]) -> None:
    problem = make_problem(CASES["mixed"], torch.float32)
    backend, layer = backend_class(problem.spec), problem.kv_cache.layer(0)
    with torch.inference_mode():
        meta = backend.plan(problem.batch, problem.kv_cache)
    backend.write(problem.k, problem.v, layer, meta)
    assert_close(backend.attend(problem.q, layer, meta), problem)


def test_a_sequence_with_nan_spoils_no_other(backend_class: type[AttentionBackend]) -> None:
    problem = make_problem(CASES["ragged_decodes"], torch.float32)
    problem.k[3], problem.v[3] = torch.nan, torch.nan
    out, expected = problem.run(backend_class(problem.spec)), dense_attention(problem)
    others = [i for i in range(len(out)) if i != 3]
    torch.testing.assert_close(out[others].double(), expected[others], rtol=0, atol=TOLERANCES[torch.float32])
    assert out[3].isnan().all()


def test_large_scores_do_not_overflow(backend_class: type[AttentionBackend]) -> None:
    problem = make_problem(CASES["mixed"], torch.float32)
    problem.q = problem.q * 1e4
    assert_close(problem.run(backend_class(problem.spec)), problem, tolerance=1e-3)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("name", ["ragged_decodes", "equal_decodes", "mixed", "gqa_8", "window_8", "ragged_prefill"])
def test_sdpa_runs_the_flash_kernel_on_a_cpu(name: str, dtype: torch.dtype) -> None:
    problem = make_problem(CASES[name], dtype)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # raises where the inputs would take the slow path
        assert_close(problem.run(SdpaAttention(problem.spec)), problem)


def test_sdpa_refuses_the_plan_of_another_backend() -> None:
    problem = make_problem(CASES["mixed"], torch.float32)
    meta = AttentionMetadata(batch=problem.batch, kv_cache=problem.kv_cache)
    with pytest.raises(TypeError, match="was given AttentionMetadata"):
        SdpaAttention(problem.spec).attend(problem.q, problem.kv_cache.layer(0), meta)


def test_many_groups_give_the_same_result_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(tuple((past, 1) for past in (5, 900, 31, 30, 450, 2, 899, 32)), num_heads=4, head_dim=8)
    problem = make_problem(case, torch.float32)
    backend = SdpaAttention(problem.spec)
    for limit in (0, 1 << 30):
        monkeypatch.setitem(LIMITS, "cpu", GroupLimits(limit, limit))
        decodes = backend.plan(problem.batch, problem.kv_cache).decodes
        assert len(decodes.groups) == (8 if limit == 0 else 1)
        assert_close(problem.run(backend), problem)
