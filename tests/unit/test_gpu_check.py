"""scripts/gpu_check.py without a GPU: it says so, and every section of it runs on a CPU at tiny sizes."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from inference_shardformer.compute.fp8_linear import multiplies_on_cpu

SCRIPTS = Path(__file__).parents[2] / "scripts"
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    yield
    for name in [name for name in sys.modules if name.split(".")[0] in ("gpu_check", "gpu_checking", "benchmarking")]:
        del sys.modules[name]


def test_without_a_device_it_says_so_in_one_line_and_ends_with_3(capsys, monkeypatch) -> None:
    import gpu_check

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main([]) == 3
    assert capsys.readouterr().out == "gpu_check: torch sees no CUDA device on this machine\n"


def test_a_section_that_fails_keeps_its_rows_and_ends_nothing() -> None:
    from gpu_checking.section import Budget, Row, as_table, run_section

    def rows():
        yield Row("first", "fine", True)
        raise ValueError("out of luck")

    section = run_section("luck", rows, Budget(100))
    assert [row.name for row in section.rows] == ["first"]
    assert section.problem.startswith("failed: ValueError: out of luck (")
    assert not section.is_right
    assert "ok  first  fine" in as_table([section])
    wrong = run_section("wrong", lambda: [Row("tokens", "3 of 4", False)], Budget(100))
    assert not wrong.is_right
    assert "BAD tokens" in as_table([wrong])
    assert json.loads(json.dumps(wrong.to_json()))["rows"][0]["is_right"] is False


def test_what_there_is_no_time_for_is_left_out_and_not_wrong() -> None:
    from gpu_checking.section import Budget, Row, run_section

    now = [0.0]
    budget = Budget(30, clock=lambda: now[0])
    now[0] = 25.0
    section = run_section("late", lambda: [Row("never", "run")], budget, needs_s=10)
    assert (section.rows, section.is_right) == ([], True)
    assert section.problem == "left out: it needs about 10 s, 5 s are left"


def test_the_roofline_counts_bytes_and_operations(monkeypatch) -> None:
    from gpu_checking import roofline

    monkeypatch.setattr(roofline, "seconds_of", lambda run, device: 0.5)
    found = roofline.measure_roofline(CPU, copy_mib=4, matrix=64)
    assert found == (2 * (2 << 20) / 0.5, 2 * 64**3 / 0.5)


def test_what_a_model_reads_and_computes() -> None:
    from gpu_checking.models import make_model, prefill_flops, read_bytes_per_token

    model = make_model("tiny", CPU, torch.float32)
    hidden, inner, layers, vocab, kv = 64, 128, 2, 512, 32
    projections = layers * (2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * inner)
    norms = (2 * layers + 1) * hidden
    assert read_bytes_per_token(model) == 4 * (projections + norms + vocab * hidden)
    assert prefill_flops(model, 10) == 20 * (projections + norms)


def test_the_kit_gives_a_row_for_every_backend() -> None:
    from gpu_checking.attention import conformance_rows, speed_rows, usual_spec
    from gpu_checking.roofline import Roofline
    from gpu_checking.section import Budget

    from inference_shardformer.attention.survey import make_survey

    spec, survey = usual_spec(CPU), make_survey(CPU)
    rows = {row.name: row for row in conformance_rows(spec, survey, Budget(600), checks=["takes_views"])}
    assert rows["sdpa"].is_right is True
    assert rows["sdpa"].value == "3 of 3 trials right"
    assert rows["varlen"].is_right is None
    assert "[device]" in rows["varlen"].value
    bounds = Roofline(1e9, 1e9)
    names = [row.name for row in speed_rows(spec, survey, bounds, context=32, prompt=8, batch=2)]
    assert {"sdpa decode 1 x 32", "sdpa decode 2 x 32", "sdpa prefill 8"} <= set(names)


@pytest.mark.parametrize("product", ["right", "wrong"])
def test_fp8_products_are_compared_with_float64(monkeypatch, product) -> None:
    from gpu_checking import fp8
    from gpu_checking.roofline import Roofline
    from scaled_mm_standin import scaled_mm

    from inference_shardformer.compute import fp8_linear

    def unscaled(a, b, *, scale_a, scale_b, **others):
        return scaled_mm(a, b, scale_a.mean().expand_as(scale_a).contiguous(), scale_b, **others)

    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm if product == "right" else unscaled)
    monkeypatch.setattr(fp8_linear, "multiplies_on_cpu", lambda: True)
    rows = list(fp8.product_rows(CPU, Roofline(1e9, 1e9), projections=[(64, 96), (128, 32)], tokens=[2, 5]))
    assert [row.name for row in rows] == ["2 x 64 -> 96", "5 x 64 -> 96", "2 x 128 -> 32", "5 x 128 -> 32"]
    assert {row.is_right for row in rows} == {product == "right"}
    monkeypatch.setattr(fp8_linear, "multiplies_on_cpu", lambda: False)
    (row,) = fp8.product_rows(CPU, Roofline(1e9, 1e9))
    assert row.is_right is None
    assert "refused: linear kernel 'fp8' cannot serve" in row.value


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("kind", ["right", "wrong"])
def test_fp8_logits_are_compared_with_fp32(monkeypatch, kind) -> None:
    from gpu_checking import fp8

    if kind == "wrong":
        monkeypatch.setattr(fp8, "ENGINES", {name: (each, 1e-4) for name, (each, _) in fp8.ENGINES.items()})
    rows = {row.name: row for row in fp8.logit_rows(CPU, num_sequences=2, num_tokens=48)}
    judged = [row for row in rows.values() if not row.value.startswith("refused")]
    assert {row.is_right for row in judged} == {kind == "right"}
    assert {"bf16", "fp8 keys and values"} <= {row.name for row in judged}
    assert ("kernels.linear fp8" in rows["fp8 both"].value) == multiplies_on_cpu()


def _small_kernels(*_: object) -> object:
    from gpu_checking.kernels import usual_kernel_spec

    spec = usual_kernel_spec(CPU, torch.float32)
    return replace(spec, hidden_size=64, intermediate_size=96, head_dim=16)


def test_every_kernel_has_a_verdict_and_those_that_can_serve_are_proven() -> None:
    from gpu_checking.kernels import fused_speed_rows, kernel_rows
    from gpu_checking.roofline import Roofline

    rows = {row.name: row for row in kernel_rows(_small_kernels())}
    assert {"rotary_write: triton", "experts: triton", "sampling: triton", "decoder_layer: fused_add"} <= set(rows)
    assert rows["rotary_write: torch"].is_right is True
    assert rows["sampling: triton"].is_right is None
    assert "[device]" in rows["sampling: triton"].value
    names = [row.name for row in fused_speed_rows(_small_kernels(), Roofline(1e9, 1e9), tokens=(3,), vocab_size=50)]
    assert "sum and norm, torch, 3 tokens" in names
    assert any(name.startswith("rotary and write, ") for name in names)


def test_two_ranks_on_one_device() -> None:
    from gpu_checking.ranks import rank_rows

    (row,) = rank_rows(CPU)
    assert (row.name, row.is_right) == ("one device, gloo", True)
    assert row.value.startswith("6 of 6 requests equal Hugging Face generate; shard.all_reduce gloo, ")


@pytest.mark.filterwarnings("default")  # transformers warns of its own parts
def test_the_whole_check_on_a_cpu(monkeypatch) -> None:
    import gpu_check
    from gpu_checking import attention
    from gpu_checking.engines import Mode, Sizes
    from gpu_checking.section import Budget

    monkeypatch.setattr(gpu_check, "speed_rows", lambda *_: ())
    monkeypatch.setattr(gpu_check, "rank_rows", lambda *_: ())
    monkeypatch.setattr(gpu_check, "usual_kernel_spec", _small_kernels)
    monkeypatch.setattr(gpu_check, "fused_speed_rows", lambda *_: ())
    monkeypatch.setattr(attention, "CHECKS", ())
    monkeypatch.setattr(gpu_check, "conformance_rows", lambda *_: ())
    monkeypatch.setattr(gpu_check, "product_rows", lambda *_: ())
    monkeypatch.setattr(gpu_check, "logit_rows", lambda *_: ())
    sizes = Sizes(decode_prompt=4, decode_tokens=4, prefill_prompt=8, ragged_requests=4)
    modes = (Mode("eager", {"graphs": "none"}),)
    sections = list(gpu_check.check(CPU, Budget(300), shapes=["tiny"], modes=modes, sizes=sizes, dtype=torch.float32))
    found = {section.name: section for section in sections}
    assert [section.name for section in sections if not section.is_right] == []
    assert [row.name for row in found["greedy tokens of families"].rows] == ["mixtral, eager", "longrope, eager"]
    assert found["drawn tokens"].rows[0].is_right is True
    (row,) = found["greedy tokens"].rows
    assert row.value.startswith("8 of 8 requests equal Hugging Face generate")
    names = [row.name for row in found["LLaMA tiny"].rows]
    assert {"hf generate: decode, batch 1", "eager: decode, batch 1", "eager: prefill 8", "eager: 4 ragged"} <= set(
        names
    )
    rounded = {row.name: row.value for row in found["LLaMA tiny in fp8"].rows}
    assert {"fp8 cache: decode, batch 1", "fp8 cache: prefill 8"} <= set(rounded)
    if multiplies_on_cpu():
        assert {"fp8: decode, batch 1", "fp8: prefill 8"} <= set(rounded)
        assert "dtype bf16" in rounded["fp8: served by"]
        assert "kernels.linear fp8" in rounded["fp8: served by"]
    else:
        assert "on this CPU" in rounded["fp8"]
    assert "dtype fp32" in next(row.value for row in found["LLaMA tiny"].rows if row.name == "eager: served by")
    assert json.dumps([section.to_json() for section in sections])
