"""The profile: what it keeps, what it chooses, that reuse measures nothing, and everything that it is refused for."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from switchable_backends import TunableAttention, switchable_registry
from tiny_models import save_tiny_model
from tuning_backends import BUCKETS, CLOCK, SPEC, registry_of, scripted

from inference_shardformer import ConfigSources, InferenceConfig, InferenceShardformer, ShardConfig, explain
from inference_shardformer.attention.survey import BACKENDS, make_survey
from inference_shardformer.config.inference import AttentionConfig
from inference_shardformer.config.loader import gather
from inference_shardformer.config.violations import ConfigViolations
from inference_shardformer.doctor.collect import collect_report
from inference_shardformer.errors import BackendUnavailableError, PluginError
from inference_shardformer.probing.facts import CpuFacts, DeviceFacts, HostFacts
from inference_shardformer.probing.requirement import ProbeResult, Requirement
from inference_shardformer.tuning import measure as measuring
from inference_shardformer.tuning import session
from inference_shardformer.tuning.comparison import Comparison, check_target
from inference_shardformer.tuning.errors import TuningProfileError
from inference_shardformer.tuning.fingerprint import differences, fingerprint_of, spec_key
from inference_shardformer.tuning.measurement import Measurement
from inference_shardformer.tuning.profile import TuningEntry, TuningProfile, is_profile
from inference_shardformer.tuning.selecting import select_backend

CPU = torch.device("cpu")
ROWS = tuple(
    Measurement(*bucket, name, seconds, 0.0)
    for bucket in BUCKETS
    for name, seconds in (("sdpa", 3.0), ("reference", 1.5))
)
COMMAND = "inference-shardformer bench backends"


def comparison(fingerprint: dict[str, str], *keys: str, rows: tuple[Measurement, ...] = ROWS) -> Comparison:
    return Comparison("a model", (0, 1), "cpu", 1, 3, keys, rows, {}, fingerprint)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model without weights: nothing that reads one comes far."""
    folder = tmp_path_factory.mktemp("model")
    save_tiny_model("gqa", folder)
    for weights in folder.glob("*.safetensors"):
        weights.unlink()
    return folder


@pytest.fixture
def saved(folder, tmp_path) -> Path:
    """A profile for that model, in which the reference was the fastest."""
    path = tmp_path / "profile.json"
    layers = gather(ConfigSources(environ={}), ShardConfig(device="cpu"), InferenceConfig())
    (spec,) = session._wanted(layers, str(folder), session.RankLayout(1, 0), CPU).groups.specs
    comparison(fingerprint_of(make_survey(CPU), spec, {}), spec_key(spec)).save(path)
    return path


@pytest.fixture
def poisoned(monkeypatch) -> None:
    def never(*_args: object, **_options: object) -> None:
        raise AssertionError("something was measured")

    for owner, name in (
        (measuring, "measure"),
        (measuring, "_measure_bucket"),
        (measuring, "make_trial"),
        (session, "compare_backends"),
        (session, "measure"),
    ):
        monkeypatch.setattr(owner, name, never)


def tuned(profile: Path | str) -> ConfigSources:
    sets = ("attention.backend=tuned", f"attention.profile={profile}", "shard.device=cpu")
    return ConfigSources(sets=sets, environ={})


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def resave(path: Path, **changes: object) -> None:
    """Change a profile as somebody who knows the checksum would."""
    replace(TuningProfile.load(path), **changes).save(path)


@pytest.mark.usefixtures("poisoned")
class TestReuse:
    def test_the_choice_is_taken_and_explained(self, folder, saved):
        explanation = explain(folder, sources=tuned(saved))
        (group,) = explanation.attention
        assert (group.selection.name, group.selection.requested) == ("reference", "tuned")
        (decision,) = [each for each in explanation.decisions if each.path == "inference.attention.backend"]
        assert decision.value == "reference"
        assert decision.reason == f"tuned: profile {saved}, fastest of 2, 2 x faster than sdpa"
        assert decision.reason in group.selection.explain()
        assert "2 x faster than sdpa" in " ".join(explanation.as_text(200).split())

    def test_an_engine_is_built_with_it(self, tmp_path, saved):
        save_tiny_model("gqa", tmp_path / "model")
        with InferenceShardformer(sources=tuned(saved)) as shardformer:
            sharded = shardformer.from_pretrained(tmp_path / "model")
            assert shardformer.attach(sharded).generate([[1, 2, 3]])[0].token_ids
            assert shardformer.explain().attention[0].selection.name == "reference"

    def test_the_doctor_takes_it_too(self, folder, saved):
        report = collect_report(gather(tuned(saved)), str(folder))
        assert {each.name: each.verdict for each in report.attention.backends}["reference"] == "chosen"
        report = collect_report(gather(tuned(saved)), None)
        assert "nothing was measured for" in report.attention.proof.detail

    def test_without_a_model_it_stays_open(self, saved):
        explanation = explain(sources=tuned(saved))
        (decision,) = [each for each in explanation.decisions if each.path == "inference.attention.backend"]
        assert (decision.value, decision.reason) == ("tuned", "needs a model")

    def test_a_round_trip_keeps_everything(self, tmp_path):
        profile = TuningProfile({"torch": "1"}, {"a": TuningEntry("sdpa", ROWS), "b": TuningEntry("sdpa", ())})
        profile.save(tmp_path / "p.json")
        assert TuningProfile.load(tmp_path / "p.json") == profile
        assert [path.name for path in tmp_path.iterdir()] == ["p.json"]

    def test_a_backend_that_can_no_longer_serve_is_refused(self, tmp_path):
        registry = registry_of()
        survey = make_survey(CPU, registry)
        spec = replace(SPEC, softcap=20.0)  # which sdpa lacks
        comparison(fingerprint_of(survey, spec, {}), spec_key(spec), rows=(ROWS[0],)).save(tmp_path / "p.json")
        with pytest.raises(BackendUnavailableError, match="'sdpa' cannot serve"):
            select_backend(spec, AttentionConfig(backend="tuned", profile=str(tmp_path / "p.json")), survey)


@pytest.mark.usefixtures("poisoned")
class TestRefusals:
    def test_a_profile_measured_with_other_options(self, folder, saved, monkeypatch):
        monkeypatch.setattr(BACKENDS, "_entries", {**BACKENDS._entries})
        BACKENDS.register("tunable", TunableAttention)
        resave(saved, fingerprint=fingerprint_of(make_survey(CPU), SPEC, {}))
        explain(folder, sources=tuned(saved))
        sets = (*tuned(saved).sets, "attention.options.tunable.splits=2", "strict=false")
        with pytest.raises(TuningProfileError, match=r'options of tunable: measured with .*1}, now {"splits": 2}'):
            explain(folder, sources=ConfigSources(sets=sets, environ={}))

    """Each is raised before any weight is read: there are none."""

    def refused(self, folder: Path, profile: Path | str) -> TuningProfileError:
        with pytest.raises(TuningProfileError) as caught:
            explain(folder, sources=tuned(profile))
        with InferenceShardformer(sources=tuned(profile)) as shardformer:
            with pytest.raises(TuningProfileError) as live:
                shardformer.from_pretrained(folder)
        assert live.value.message == caught.value.message
        assert f"{COMMAND} --model MODEL --save {profile}" in caught.value.remedy
        assert (caught.value.code, caught.value.exit_code) == ("tuning_profile", 2)
        return caught.value

    def test_stale_names_what_differs(self, folder, saved):
        present = TuningProfile.load(saved).fingerprint
        resave(saved, fingerprint={**present, "torch": "2.0.0", "backend gone": "gone 1.0"})
        message = self.refused(folder, saved).message
        assert f"torch: measured with 2.0.0, now {torch.__version__}" in message
        assert "backend gone: measured with gone 1.0, now absent" in message
        assert "processor" not in message

    def test_an_edited_choice(self, folder, saved):
        saved.write_text(saved.read_text().replace('"choice": "reference"', '"choice": "sdpa"'))
        assert "its checksum does not fit" in self.refused(folder, saved).message

    @pytest.mark.parametrize("change", [{"checksum": "sha256:0"}, {"note": 1}, {"fingerprint": {}}, {"entries": {}}])
    def test_any_other_edit(self, folder, saved, change):
        edit(saved, **change)
        assert "its checksum does not fit" in self.refused(folder, saved).message

    def test_other_shapes(self, folder, saved):
        entries = TuningProfile.load(saved).entries
        resave(saved, entries={"num_heads=1": next(iter(entries.values()))})
        message = self.refused(folder, saved).message
        assert "nothing was measured for num_heads=" in message
        assert message.endswith("it holds\n  num_heads=1")
        resave(saved, entries={})
        assert self.refused(folder, saved).message.endswith("it holds nothing")

    @pytest.mark.parametrize(
        ("content", "problem"),
        [
            (None, "cannot be read: No such file"),
            ("{", "is not JSON"),
            ("[]", "is no inference-shardformer tuning profile"),
            ('{"kind": "other"}', "is no inference-shardformer tuning profile"),
            ("\udce9", "is not JSON"),
        ],
    )
    def test_unreadable(self, folder, tmp_path, content, problem):
        path = tmp_path / "p.json"
        if content is not None:
            path.write_bytes(content.encode("utf-8", "surrogateescape"))
        assert problem in self.refused(folder, path).message

    def test_a_folder_is_no_file(self, folder, tmp_path):
        assert "cannot be read: Is a directory" in self.refused(folder, tmp_path).message

    def test_another_schema(self, folder, saved):
        edit(saved, schema_version=2)
        assert "schema_version 2, this version reads 1" in self.refused(folder, saved).message

    @pytest.mark.parametrize(
        ("name", "value", "problem"),
        [
            ("fingerprint", [], "malformed"),
            ("entries", [], "malformed"),
            ("entries", {"a": {}}, "malformed"),
            ("entries", {"a": 1}, "malformed"),
            ("extra", 1, "it has the fields checksum, entries, extra, "),
        ],
    )
    def test_malformed_with_a_checksum_that_fits(self, folder, saved, name, value, problem):
        from inference_shardformer.tuning.profile import _checksum

        document = {**json.loads(saved.read_text()), name: value}
        saved.write_text(json.dumps({**document, "checksum": _checksum(document)}))
        assert problem in self.refused(folder, saved).message

    def test_tuned_without_a_profile(self, folder):
        sources = ConfigSources(sets=("attention.backend=tuned", "shard.device=cpu"), environ={})
        with pytest.raises(TuningProfileError, match=r"attention\.profile, which is not set") as caught:
            explain(folder, sources=sources)
        assert f"{COMMAND} --model MODEL --save FILE" in caught.value.remedy

    def test_a_profile_without_tuned_has_no_effect(self, folder, saved):
        sources = ConfigSources(sets=(f"attention.profile={saved}", "shard.device=cpu"), environ={})
        with pytest.raises(ConfigViolations, match="only tuned reads a profile"):
            explain(folder, sources=sources)

    def test_it_is_reported_with_everything_else(self, folder, tmp_path):
        sets = (*tuned(tmp_path / "none").sets, "max_model_len=999999")
        with pytest.raises(ConfigViolations) as caught:
            explain(folder, sources=ConfigSources(sets=sets, environ={}))
        assert len(caught.value.violations) == 2


class TestSaving:
    def test_entries_of_the_same_fingerprint_are_kept(self, tmp_path):
        path = tmp_path / "p.json"
        comparison({"torch": "1"}, "a", "b").save(path)
        comparison({"torch": "1"}, "b", "c", rows=ROWS[:1]).save(path)
        entries = TuningProfile.load(path).entries
        assert {key: entry.choice for key, entry in entries.items()} == {"a": "reference", "b": "sdpa", "c": "sdpa"}

    @pytest.mark.parametrize("spoil", [lambda path: edit(path, entries={}), lambda path: resave(path, fingerprint={})])
    def test_a_stale_or_edited_one_is_replaced(self, tmp_path, spoil):
        path = tmp_path / "p.json"
        comparison({"torch": "1"}, "a").save(path)
        spoil(path)
        comparison({"torch": "1"}, "b").save(path)
        assert list(TuningProfile.load(path).entries) == ["b"]

    def test_another_file_is_not_overwritten(self, tmp_path):
        path = tmp_path / "notes.json"
        path.write_text('{"mine": 1}')
        for save in (check_target, comparison({}, "a").save):
            with pytest.raises(TuningProfileError, match="is not overwritten"):
                save(path)
        assert path.read_text() == '{"mine": 1}'
        assert not is_profile(path)

    def test_a_folder_that_is_not_there(self, tmp_path):
        with pytest.raises(TuningProfileError, match="its folder does not exist"):
            check_target(tmp_path / "none" / "p.json")
        with pytest.raises(TuningProfileError, match="cannot be written"):
            TuningProfile({}).save(tmp_path / "none" / "p.json")

    def test_without_a_choice_nothing_is_saved(self, tmp_path):
        rows = (replace(ROWS[0], problem="wrong"),)
        with pytest.raises(BackendUnavailableError, match="wrong"):
            comparison({}, "a", rows=rows).save(tmp_path / "p.json")
        assert not list(tmp_path.iterdir())


class TestFingerprint:
    def test_it_has_the_device_the_versions_and_every_backend(self):
        found = fingerprint_of(make_survey(CPU, registry_of(scripted("mine"))), SPEC, {})
        assert found["torch"] == torch.__version__
        assert {"backend sdpa", "backend reference", "backend mine", "device", "processor"} <= set(found)

    def test_libraries_and_accelerators_count(self):
        needs = Requirement("flash", "pip it")
        backend = type("Flash", (scripted("flash"),), {"requires": (needs,)})
        survey = replace(
            make_survey(CPU, registry_of(backend)),
            host=HostFacts(CpuFacts("x86_64", "Xeon"), (DeviceFacts("cuda", "H200", (9, 0), 2**37),)),
        )
        spec = replace(SPEC, device=torch.device("cuda", 0))
        old, new = (
            fingerprint_of(replace(survey, probes={needs: ProbeResult("flash", "ok", version)}), spec, {})
            for version in ("2.6", "2.7")
        )
        assert old["device"] == f"cuda H200 {2**37}"
        (difference,) = differences(old, new)
        assert "backend flash" in difference
        assert difference.endswith("flash ok 2.7")
        broken = replace(survey, candidates=(replace(survey.candidates[0], error=PluginError("no"), backend=None),))
        assert "failed to load" in fingerprint_of(broken, spec, {})["backend sdpa"]

    def test_options_of_every_backend_count_with_their_defaults(self):
        survey = make_survey(CPU, switchable_registry())
        plain, three, as_default = (
            fingerprint_of(survey, SPEC, options)
            for options in ({}, {"tunable": {"splits": 3}}, {"tunable": {"splits": 1}})
        )
        assert "options of sdpa" not in plain
        assert plain == as_default
        assert differences(plain, three) == ['options of tunable: measured with {"splits": 1}, now {"splits": 3}']
        assert fingerprint_of(survey, SPEC, {"tunable": {"splits": "x"}})["options of tunable"].startswith("not valid")

    def test_keys_differ_by_what_matters(self):
        specs = [SPEC, replace(SPEC, num_heads=2), replace(SPEC, softcap=1.0), replace(SPEC, dtype=torch.bfloat16)]
        specs += [replace(SPEC, block_size=8), replace(SPEC, device=torch.device("cuda")), replace(SPEC, sinks=True)]
        assert len({spec_key(spec) for spec in specs}) == len(specs)
        assert spec_key(replace(SPEC, device=torch.device("cuda", 1))) == spec_key(specs[5])


def test_a_measured_profile_gives_the_measured_choice(tmp_path):
    slow, fast = scripted("slow"), scripted("fast", seconds={"decode": [0.1], "prefill": [0.1], "mixed": [0.1]})
    wrong = scripted("wrong", seconds={"decode": [0.01], "prefill": [0.01], "mixed": [0.01]}, error=1.0)
    registry = registry_of(slow, wrong, fast, alone=True)
    layers = gather(ConfigSources(environ={}), ShardConfig(device="cpu"), InferenceConfig(dtype="fp32"))
    (found,) = session.compare_backends(layers, None, BUCKETS, rounds=2, registry=registry, clock=CLOCK)
    assert found.choice == "fast"
    found.save(tmp_path / "p.json")
    entry = TuningProfile.load(tmp_path / "p.json").entry(tmp_path / "p.json", found.keys[0])
    assert (entry.choice, entry.measurements) == ("fast", found.rows)
    assert found.why == "fastest of 3, 10 x faster than slow"
