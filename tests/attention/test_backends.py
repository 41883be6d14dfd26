"""What the conformance kit does not ask of every backend: how `sdpa` uses torch, and refuses misuse."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from inference_shardformer.attention.base import AttentionMetadata
from inference_shardformer.attention.reference import ReferenceAttention
from inference_shardformer.attention.sdpa import SdpaAttention
from inference_shardformer.attention.sdpa_plan import LIMITS, GroupLimits
from inference_shardformer.conformance.cases import MIXED, Case, named_batches
from inference_shardformer.conformance.problem import make_problem
from inference_shardformer.conformance.verdicts import TOLERANCES, require_close
from inference_shardformer.errors import BackendUnavailableError

BATCHES = named_batches(16)
SHAPES = {
    "ragged_decodes": Case(BATCHES["ragged_decodes"]),
    "equal_decodes": Case(BATCHES["equal_decodes"]),
    "ragged_prompts": Case(BATCHES["ragged_prompts"]),
    "mixed": Case(MIXED),
    "gqa_8": Case(MIXED, gqa_ratio=8),
    "window_8": Case(MIXED, window=8),
}


def assert_right(backend, problem) -> None:
    require_close(problem.step(backend), problem.layers[0].expected, TOLERANCES[problem.spec.dtype], "sdpa")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", SHAPES.values(), ids=SHAPES)
def test_sdpa_runs_the_flash_kernel_on_a_cpu(case: Case, dtype: torch.dtype) -> None:
    problem = make_problem(replace(case, dtype=dtype))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # raises where the inputs would take the slow path
        assert_right(SdpaAttention(problem.spec), problem)


def test_sdpa_refuses_the_plan_of_another_backend() -> None:
    problem = make_problem(Case(MIXED))
    meta = AttentionMetadata(batch=problem.batch, kv_cache=problem.kv_cache)
    with pytest.raises(TypeError, match="was given AttentionMetadata"):
        SdpaAttention(problem.spec).attend(problem.layers[0].q, problem.kv_cache.layer(0), meta)


def test_many_groups_give_the_same_result_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make_problem(Case(tuple((past, 1) for past in (5, 900, 31, 30, 450, 2, 899, 32)), head_dim=8))
    backend = SdpaAttention(problem.spec)
    for limit in (0, 1 << 30):
        monkeypatch.setitem(LIMITS, "cpu", GroupLimits(limit, limit))
        decodes = backend.plan(problem.batch, problem.kv_cache).decodes
        assert len(decodes.groups) == (8 if limit == 0 else 1)
        assert_right(backend, problem)


def test_hooks_without_their_feature_raise_a_typed_error() -> None:
    problem = make_problem(Case(MIXED))
    sdpa, reference = SdpaAttention(problem.spec), ReferenceAttention(problem.spec)
    meta = sdpa.plan(problem.batch, problem.kv_cache)
    layer, cache = problem.layers[0], problem.kv_cache.layer(0)
    with pytest.raises(BackendUnavailableError, match="'sdpa' does not have the feature sinks"):
        sdpa.attend_with_sinks(layer.q, cache, meta, torch.zeros(6))
    with pytest.raises(BackendUnavailableError, match="'reference' does not have the feature graphs"):
        reference.plan_capture(2, problem.kv_cache)
    with pytest.raises(BackendUnavailableError, match=r"graphs\n  remedy: ask for it in AttentionSpec.features"):
        reference.replan(problem.batch, meta)
