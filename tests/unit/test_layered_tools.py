"""`doctor`, `bench backends` and `tuned` for a model whose layers need different attention."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tuning_backends import BUCKETS, CLOCK, registry_of, scripted
from windowed_models import WINDOWS, plain_backends, windowed_config

from inference_shardformer import ConfigSources, InferenceConfig, ShardConfig, explain
from inference_shardformer.attention.sdpa import SdpaAttention
from inference_shardformer.attention.spec import ENGINE_FEATURES
from inference_shardformer.attention.survey import BACKENDS
from inference_shardformer.cli import doctor_view
from inference_shardformer.cli.main import main
from inference_shardformer.config.loader import gather
from inference_shardformer.doctor.collect import collect_report
from inference_shardformer.doctor.compare import differences
from inference_shardformer.doctor.findings import Findings
from inference_shardformer.doctor.report import RankReport
from inference_shardformer.policies.llama import LlamaPolicy
from inference_shardformer.tuning import session
from inference_shardformer.tuning.errors import TuningProfileError
from inference_shardformer.tuning.profile import TuningProfile

GRID = ("--phases", "decode", "--batches", "1", "--lengths", "8", "--repeat", "1", "--device", "cpu")
WHOLE, WINDOWED = "layers 0,2", "layers 1,3"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model without weights whose odd layers have a window."""
    facts = LlamaPolicy.facts
    monkeypatch.setattr(
        LlamaPolicy, "facts", lambda self, config: replace(facts(self, config), sliding_windows=WINDOWS)
    )
    config = windowed_config()
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BACKENDS, "_entries", plain_backends())


@pytest.fixture
def sdpa_without_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SdpaAttention, "capabilities", replace(SdpaAttention.capabilities, features=ENGINE_FEATURES))


def layers(**attention: object) -> object:
    inference = InferenceConfig.model_validate({"dtype": "fp32", "attention": attention})
    return gather(ConfigSources(environ={}), ShardConfig(device="cpu"), inference)


class TestDoctor:
    def test_every_group_is_judged_and_proven(self, folder, sdpa_without_windows):
        report = collect_report(layers(), str(folder))
        assert (report.chosen, len(report.other_layers)) == (("sdpa", "reference"), 1)
        assert [each.of.split(" of ")[0] for each in report.layers] == [WHOLE, WINDOWED]
        assert {each.proof.outcome for each in report.layers} == {"passed"}
        assert report.other_layers[0].spec["sliding_window"] == "6"
        assert RankReport.from_json(report.to_json()) == report
        findings = Findings((report,))
        assert findings.can_serve
        text = doctor_view.as_text(findings, 120)
        assert "attention backend sdpa + reference can serve" in text
        assert text.count("proof") == 2

    def test_a_group_without_a_backend_cannot_serve(self, folder, sdpa_without_windows):
        report = collect_report(layers(backend="sdpa"), str(folder))
        assert (report.chosen, report.attention.can_serve) == (("sdpa", None), True)
        findings = Findings((report,))
        assert not findings.can_serve
        assert doctor_view.summary(findings) == "this machine: sdpa cannot serve"

    def test_ranks_are_compared_in_every_group(self, folder):
        report = collect_report(layers(), str(folder))
        (other,) = report.other_layers
        seconds = replace(other, proof=replace(other.proof, seconds=99.0))
        slower = replace(report, rank=1, other_layers=(replace(seconds, spec={**other.spec, "device": "cpu:1"}),))
        assert differences((report, slower)) == ()
        wider = replace(report, rank=1, other_layers=(replace(other, spec={**other.spec, "sliding_window": "7"}),))
        (difference,) = differences((report, wider))
        assert difference.path.endswith("spec.sliding_window")
        assert WINDOWED in difference.path


class TestExplain:
    def test_the_command_has_a_section_for_each_group(self, folder, sdpa_without_windows, capsys):
        words = ("explain", "--model", str(folder), "--device", "cpu", "--tp", "2")
        assert main([*words]) == 0
        text = " ".join(capsys.readouterr().out.split())
        assert f"{WHOLE} on ranks 0-1 4 heads, 2 key/value heads, head_dim 8, float32 sdpa chosen" in text
        assert f"{WINDOWED} on ranks 0-1 4 heads, 2 key/value heads, head_dim 8, float32, window 6 sdpa" in text
        assert main([*words, "--json"]) == 0
        attention = json.loads(capsys.readouterr().out)["attention"]
        assert [group["chosen"] for group in attention["groups"]] == ["sdpa", "reference"]


class TestTuning:
    def test_every_group_is_measured_and_looked_up(self, folder, tmp_path):
        def compared(**seconds: float) -> tuple[session.Comparison, ...]:
            backends = [
                scripted(name, seconds={phase: [value] for phase in ("decode", "prefill", "mixed")})
                for name, value in seconds.items()
            ]
            registry = registry_of(*backends, alone=True)
            return session.compare_backends(layers(), str(folder), BUCKETS, rounds=2, registry=registry, clock=CLOCK)

        whole, windowed = compared(slow=1.0, fast=0.1)
        assert (whole.layers, windowed.layers) == ((0, 2), (1, 3))
        assert windowed.of.startswith(f"{WINDOWED} of ")
        assert whole.keys != windowed.keys
        for found in (whole, windowed):
            found.save(tmp_path / "p.json")
        assert len(TuningProfile.load(tmp_path / "p.json").entries) == 2

    def test_measured_saved_and_used(self, folder, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        assert main(["bench", "backends", "--model", str(folder), *GRID, "--json", "--save", "p.json"]) == 0
        records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [record["layers"] for record in records] == [[0, 2], [1, 3]]
        sources = ConfigSources(
            sets=("attention.backend=tuned", "attention.profile=p.json", "shard.device=cpu"), environ={}
        )
        groups = explain(folder, sources=sources).attention
        assert [group.selection.name for group in groups] == [record["choice"] for record in records]
        profile = TuningProfile.load("p.json")
        first = next(iter(profile.entries))
        replace(profile, entries={first: profile.entries[first]}).save("p.json")
        with pytest.raises(TuningProfileError, match=rf"{WINDOWED} \(.*window 6\): .*nothing was measured for"):
            explain(folder, sources=sources)

    def test_a_plot_for_each_group(self, folder, tmp_path, capsys):
        pytest.importorskip("matplotlib")
        words = ("--model", str(folder), *GRID, "--plot", str(tmp_path / "p.svg"))
        assert main(["bench", "backends", *words]) == 0
        assert sorted(path.name for path in tmp_path.glob("*.svg")) == ["p-1.svg", "p-2.svg"]
        assert WINDOWED in capsys.readouterr().out
