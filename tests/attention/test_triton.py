"""Backend `triton`: the conformance kit in Triton's interpreter, and what can be asked without any device."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from selection_profiles import PROFILES

from inference_shardformer.attention.base import AttentionMetadata, Feature, Requirement
from inference_shardformer.attention.selector import select
from inference_shardformer.attention.triton import TritonAttention
from inference_shardformer.conformance.cases import MIXED, Case
from inference_shardformer.conformance.problem import make_problem

KIT = Path(__file__).parent / "interpreted" / "conformance.py"


def test_it_passes_the_conformance_kit_in_the_interpreter(tmp_path) -> None:
    pytest.importorskip("triton")
    from interpreting import interpreter_problem, run_interpreted

    problem = interpreter_problem(tmp_path)
    if problem:
        pytest.skip(problem)
    assert run_interpreted(KIT) > 80


def test_looking_at_it_imports_no_triton() -> None:
    script = (
        "import sys\n"
        "from inference_shardformer.attention.triton import TritonAttention\n"
        "from inference_shardformer.compute.triton_norm import TritonNorm\n"
        "from inference_shardformer.compute.triton_activation import TritonActivation\n"
        "sys.exit('triton' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False, cwd="/").returncode == 0


def test_it_serves_what_sdpa_cannot_and_old_devices_not_at_all() -> None:
    profile = PROFILES["cuda_sm80"]
    spec = replace(profile.attention_spec(), softcap=30.0, sinks=True, sliding_window=100, block_size=5)
    spec = replace(spec, features=spec.features | {Feature.GRAPHS}, kv_dtype=torch.float8_e4m3fn)
    assert select(spec, "auto", profile.survey()).name == "triton"
    (verdict,) = (
        each
        for each in select(PROFILES["cuda_sm75"].attention_spec(), "auto", PROFILES["cuda_sm75"].survey()).verdicts
        if each.name == "triton"
    )
    assert [reason.code for reason in verdict.reasons] == ["wrong_device"]


def test_it_declares_the_triton_of_torch_2_5() -> None:
    assert TritonAttention.requires == (
        Requirement(
            "triton",
            TritonAttention.requires[0].remedy,
            min_version="3.1",
            names=("jit", "compile", "language.dot"),
            platforms=("cuda", "rocm"),
            min_capability=(8, 0),
        ),
    )


def test_it_refuses_the_plan_of_another_backend() -> None:
    pytest.importorskip("triton")
    problem = make_problem(Case(MIXED))
    meta = AttentionMetadata(batch=problem.batch, kv_cache=problem.kv_cache)
    with pytest.raises(TypeError, match="triton was given AttentionMetadata"):
        TritonAttention(problem.spec).attend(problem.layers[0].q, problem.kv_cache.layer(0), meta)


def test_a_captured_plan_is_as_large_whatever_the_lengths() -> None:
    pytest.importorskip("triton")
    problem = make_problem(Case(((20, 1), (300, 1))))
    backend = TritonAttention(problem.spec)
    meta = backend.plan_capture(2, problem.kv_cache)
    assert meta.batch.block_tables.shape == (2, problem.kv_cache.num_blocks)
    before = {name: value.data_ptr() for name, value in meta.workspace._asdict().items() if torch.is_tensor(value)}
    backend.replan(problem.batch, meta)
    assert {name: getattr(meta.workspace, name).data_ptr() for name in before} == before
    assert meta.batch.seq_lens.tolist() == [21, 301]
    assert backend.plan(problem.batch, problem.kv_cache).workspace.lse.shape == (2, 6, 2)
    nothing = make_problem(Case(((0, 5),)))
    assert backend.plan(nothing.batch, nothing.kv_cache).workspace is None
