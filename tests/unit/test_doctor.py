"""`doctor`: what a rank reports, what differs between ranks, what is warned of, and what a user sees."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from typing import ClassVar

import pytest
import torch

from inference_shardformer.attention.reference import ReferenceAttention
from inference_shardformer.attention.survey import BackendRegistry, make_registry
from inference_shardformer.cli import doctor_view
from inference_shardformer.cli.main import main
from inference_shardformer.config.loader import gather
from inference_shardformer.config.sources import ConfigSources, Flag
from inference_shardformer.doctor import exchange, machine
from inference_shardformer.doctor.collect import collect_report
from inference_shardformer.doctor.compare import differences, warnings_of
from inference_shardformer.doctor.findings import Findings
from inference_shardformer.doctor.report import (
    AttentionReport,
    BackendReport,
    CpuUse,
    Memory,
    NativeReport,
    ProofReport,
    RankReport,
    ReasonReport,
)
from inference_shardformer.errors import EnvironmentMismatchError, TensorParallelSizeError
from inference_shardformer.kernels.cpu import library
from inference_shardformer.probing.facts import CpuFacts, DeviceFacts, HostFacts
from inference_shardformer.probing.requirement import Requirement

UNBUILT = NativeReport("/k.so", problem=ReasonReport("native_build", "g++ failed", "install another compiler"))
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def report(rank: int = 0, **changes) -> RankReport:
    """A rank of two that is well."""
    plain = RankReport(
        rank=rank,
        world_size=2,
        ranks_on_host=2,
        hostname="h",
        versions={"python": "3.12.1", "torch": "2.13.0", "triton": None},
        host=HostFacts(CpuFacts("x86_64", "Xeon", ("avx2",)), process_group_backends=("gloo",)),
        device="cpu",
        device_reason="no CUDA device is present",
        cpu_use=CpuUse(8, None, 4, "8 cores shared by 2 ranks", ("/torch/lib/libgomp.so.1",)),
        native=NativeReport("/k/_native.so", "avx2", ("portable", "avx2")),
        memory=Memory(2**34, 2**33 + rank, None),
        environment={"RANK": str(rank), "WORLD_SIZE": "2"},
        plugins={},
        attention=AttentionReport(
            "a model",
            {"num_heads": "16", "device": "cpu"},
            "auto",
            (
                BackendReport("sdpa", "o1", "chosen"),
                BackendReport("flash", "o2", "refused", (ReasonReport("missing", "flash is not installed", "pip it"),)),
            ),
            ProofReport("passed", "sdpa gave what the reference gives", "", 0.1 + rank),
        ),
    )
    return replace(plain, **changes)


def refused(found: RankReport, requested: str = "auto") -> RankReport:
    """The same rank, on which nothing can serve."""
    backends = (
        BackendReport("sdpa", "o1", "refused", (ReasonReport("dtype", "dtype float64 is not", "choose another"),)),
        found.attention.backends[1],
    )
    proof = ProofReport("not run", "no attention backend can serve this model", "choose another")
    return replace(found, attention=replace(found.attention, requested=requested, backends=backends, proof=proof))


def failed(found: RankReport) -> RankReport:
    """The same rank, whose winner differs from the reference."""
    proof = ProofReport("failed", "sdpa differs from the reference", "choose another")
    return replace(found, attention=replace(found.attention, proof=proof))


class TestReport:
    def test_round_trip(self):
        assert RankReport.from_json(report(1).to_json()) == report(1)

    def test_an_unknown_field_is_refused(self):
        with pytest.raises(ValueError, match="surprise"):
            RankReport.from_json(json.dumps({**json.loads(report().to_json()), "surprise": 1}))


class TestDifferences:
    def test_ranks_that_are_alike(self):
        assert differences([report(0), report(1)]) == ()
        assert differences([report(0)]) == ()

    def test_one_rank_of_three_is_named(self):
        odd = report(1, versions={"python": "3.12.1", "torch": "2.5.1", "triton": None})
        (found,) = differences([report(0), odd, report(2)])
        assert found.path == "versions.torch"
        assert found.groups() == {"2.13.0": [0, 2], "2.5.1": [1]}

    def test_what_only_one_has_is_absent_elsewhere(self):
        (found,) = differences([report(0), report(1, plugins={"acme": "acme 1.0"})])
        assert found.values == {0: "absent", 1: "acme 1.0"}

    def test_a_verdict_of_one_backend_is_found_by_its_name(self):
        verdicts = refused(report(1)).attention.backends
        odd = report(1, attention=replace(report(1).attention, backends=verdicts))
        paths = [each.path for each in differences([report(0), odd])]
        assert paths[0] == "attention.backends.sdpa.verdict"
        assert all(path.startswith("attention.backends.sdpa.") for path in paths)

    def test_names_of_hosts_may_differ(self):
        assert differences([report(0), report(1, hostname="other")]) == ()

    @pytest.mark.parametrize(
        ("changes", "path"),
        [
            ({"memory": Memory(2**30, 2**29, None)}, "memory.total"),
            ({"environment": {"RANK": "1", "WORLD_SIZE": "2", "OMP_NUM_THREADS": "3"}}, "environment.OMP_NUM_THREADS"),
            ({"host": HostFacts(CpuFacts("x86_64", "EPYC", ("avx2",)), (), "", None, ("gloo",))}, "host.cpu.name"),
        ],
    )
    def test_facts_of_the_machine(self, changes, path):
        assert path in [each.path for each in differences([report(0), report(1, **changes)])]


class TestWarnings:
    def test_nothing_to_say(self):
        assert warnings_of([report(0), report(1)]) == ()

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"cpu_use": CpuUse(4, None, 3, "")}, "2 ranks x 3 threads share 4 cores"),
            ({"cpu_use": CpuUse(8, 2.0, 2, "")}, "2 ranks x 2 threads share 2 cores"),
            ({"cpu_use": CpuUse(8, 8.0, 2, ""), "environment": {"OMP_NUM_THREADS": "2"}}, "leave 4 of 8 cores idle"),
            ({"environment": {"OMP_NUM_THREADS": "many"}}, "OMP_NUM_THREADS=many is no number of threads"),
            ({"cpu_use": CpuUse(8, 2.5, 2, "")}, "share 2.5 cores (the control group allows no more of the 8 that"),
            (
                {"cpu_use": CpuUse(8, None, 4, "", ("/a/libgomp.so.1", "/b/libiomp5.so"))},
                "2 OpenMP runtimes are loaded",
            ),
            ({"host": HostFacts(CpuFacts("x86_64", "Xeon"))}, "neither gloo nor nccl"),
            ({"native": UNBUILT}, "not used: g++ failed; to use them, install another compiler"),
            ({"native": NativeReport("/k.so", "avx2", ("avx2",), True)}, "/k.so was built from other sources: run"),
        ],
    )
    def test_a_line_each(self, changes, said):
        (line,) = warnings_of([report(0, **changes), report(1, **changes)])
        assert said in line

    def test_a_gpu_rank_needs_no_cores_and_no_cpu_kernels(self):
        changes = {"cpu_use": CpuUse(8, None, 1, ""), "environment": {"OMP_NUM_THREADS": "1"}, "native": UNBUILT}
        assert warnings_of([report(0, device="cuda:0", **changes)]) == ()


class TestFindings:
    @pytest.mark.parametrize(
        ("reports", "missing", "can_serve", "said"),
        [
            ([report(0), report(1)], {}, True, "2 ranks: attention backend sdpa can serve"),
            ([report(0)], {}, True, "this machine: attention backend sdpa can serve"),
            ([report(0)], {1: "gone"}, False, "2 ranks: 1 rank sent no report"),
            ([report(0), refused(report(1))], {}, False, "2 ranks: no attention backend can serve"),
            ([refused(report(0), "flash")], {}, False, "this machine: flash cannot serve"),
            ([failed(report(0))], {}, False, "this machine: attention backend sdpa failed its proof"),
        ],
    )
    def test_verdict(self, reports, missing, can_serve, said):
        findings = Findings(tuple(reports), missing)
        assert findings.can_serve is can_serve
        assert doctor_view.summary(findings) == said
        assert findings.to_json()["can_serve"] is can_serve

    def test_ranks_that_would_choose_differently(self):
        other = (BackendReport("flash", "o2", "chosen"),)
        odd = replace(report(1), attention=replace(report(1).attention, backends=other))
        findings = Findings((report(0), odd))
        assert not findings.can_serve
        assert "different attention backends, sdpa and flash" in doctor_view.summary(findings)

    def test_json_is_stable(self):
        document = json.loads(json.dumps(Findings((report(0), report(1)), {2: "gone"}).to_json()))
        assert list(document) == ["schema_version", "can_serve", "ranks", "missing", "differences", "warnings"]
        assert document["schema_version"] == 1
        assert document["missing"] == {"2": "gone"}
        assert RankReport.from_json(json.dumps(document["ranks"][1])) == report(1)


class TestView:
    FINDINGS = Findings(
        (report(0, plugins={"acme": "entry point acme"}), refused(report(1, problems=("something is odd",)))),
        {2: "gone"},
    )

    @pytest.mark.parametrize("width", [80, 100])
    def test_text_fits_and_says_everything(self, width):
        text = doctor_view.as_text(self.FINDINGS, width)
        assert max(map(len, text.splitlines())) <= width
        for said in (
            *("Xeon", "torch 2.13.0", "plug-ins", "acme (entry point acme)", "flash is not installed [missing]"),
            *("remedy: pip it", "backends on rank 1", "dtype float64 is not [dtype]", "something is odd", "gone"),
            *("attention.backends.sdpa.verdict", "refused on rank 1", "passed", "(0.10 s)"),
        ):
            assert said in text, said

    def test_no_differences_are_said_to_be_none(self):
        assert "every rank found the same" in doctor_view.as_text(Findings((report(0), report(1))), 80)
        assert "differences" not in doctor_view.as_text(Findings((report(0),)), 80)

    @pytest.mark.parametrize(
        ("native", "said"),
        [
            (report().native, "kernels for avx2 (of portable, avx2)\n"),
            (replace(report().native, is_stale=True), "kernels for avx2 (of portable, avx2), built from other sources"),
            (UNBUILT, "no kernels: g++ failed [native_build]"),
        ],
    )
    def test_native_kernels_or_why_there_are_none(self, native, said):
        assert said in doctor_view.as_text(Findings((report(0, native=native),)), 100)

    def test_a_device_shows_its_capability_and_memory(self):
        host = HostFacts(CpuFacts("x86_64", "Xeon"), (DeviceFacts("cuda", "H100", (9, 0), 80 << 30),))
        text = doctor_view.as_text(Findings((report(0, host=host),)), 100)
        assert "H100 (cuda, 9.0, 80.0 GiB)" in text

    def test_a_terminal_gets_the_same_words_from_rich(self, monkeypatch):
        class Terminal(io.StringIO):
            def isatty(self) -> bool:
                return True

        monkeypatch.setenv("COLUMNS", "80")
        monkeypatch.setenv("TERM", "xterm")
        out = Terminal()
        doctor_view.show(self.FINDINGS, out)
        assert "\x1b[" in out.getvalue()
        for said in ("Xeon", "flash is not installed", "something is odd", "sdpa.verdict"):
            assert said in out.getvalue()


class NeedsLibrary(ReferenceAttention):
    """A plug-in whose library is missing."""

    name: ClassVar[str] = "needs_library"
    requires = (Requirement("no_such_library", "pip install no-such-library"),)


class Wrong(ReferenceAttention):
    """A plug-in that differs from the reference."""

    name: ClassVar[str] = "wrong"

    def attend(self, q, cache, meta):
        return super().attend(q, cache, meta) + 1


@pytest.fixture
def registry() -> BackendRegistry:
    registry = make_registry()
    registry.register("needs_library", NeedsLibrary, origin="a test")
    registry.register("wrong", Wrong, origin="a test")
    return registry


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch):
    for name in (*LAUNCHER, "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)


def collected(registry: BackendRegistry, model: str | None = None, **flags: str) -> RankReport:
    given = tuple(Flag(path, path.replace("__", "."), text) for path, text in flags.items())
    return collect_report(gather(ConfigSources(flags=given, environ={})), model, registry)


class TestCollect:
    def test_this_machine(self, registry):
        found = collected(registry)
        assert found.attention.can_serve
        assert found.attention.chosen == ("cpu" if found.native.problem is None else "sdpa")
        assert found.attention.proof.seconds > 0
        assert found.versions["torch"] == torch.__version__
        assert found.plugins == {"needs_library": "a test", "wrong": "a test"}
        verdicts = {each.name: each for each in found.attention.backends}
        assert verdicts["needs_library"].reasons[0].remedy == "pip install no-such-library"
        assert verdicts["reference"].verdict == "could serve"
        assert (found.rank, found.world_size, found.device) == (0, 1, "cpu")
        assert found.problems == ()

    def test_a_backend_that_fails_its_proof(self, registry):
        found = collected(registry, inference__attention__backend="wrong")
        assert found.attention.proof.outcome == "failed"
        assert "differs from the reference" in found.attention.proof.detail
        assert found.attention.proof.remedy
        assert not found.attention.can_serve

    def test_a_backend_that_is_refused_or_unknown(self, registry):
        for name, said in (("needs_library", "no_such_library is not installed"), ("spda", "did you mean 'sdpa'?")):
            found = collected(registry, inference__attention__backend=name)
            assert found.attention.proof.outcome == "not run"
            assert said in found.attention.proof.detail
            assert {each.name for each in found.attention.backends} == set(registry.names())

    def test_the_spec_of_a_model(self, registry, tmp_path):
        facts = {"num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 48, "intermediate_size": 96}
        config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "float16", **facts}
        (tmp_path / "config.json").write_text(json.dumps(config))
        spec = collected(registry, str(tmp_path), inference__cache__block_size="32").attention.spec
        expected = {"num_heads": "6", "num_kv_heads": "2", "head_dim": "8", "dtype": "float16", "block_size": "32"}
        assert spec == {**expected, "device": "cpu"}

    def test_a_rank_of_a_launch(self, registry, monkeypatch, tmp_path):
        for name, value in zip(LAUNCHER, ("1", "2", "1", "2", "127.0.0.1", "1"), strict=True):
            monkeypatch.setenv(name, value)
        found = collected(registry)
        assert (found.rank, found.world_size, found.ranks_on_host) == (1, 2, 2)
        assert found.attention.spec["num_kv_heads"] == "4"
        assert found.environment["MASTER_ADDR"] == "127.0.0.1"
        heads = {"num_attention_heads": 3, "num_key_value_heads": 3, "hidden_size": 24, "intermediate_size": 48}
        config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **heads}
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(TensorParallelSizeError):
            collected(registry, str(tmp_path))

    def test_half_an_environment_and_an_absent_device_are_problems(self, registry, monkeypatch):
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        found = collected(registry, shard__device="cuda")
        assert "the launcher's variables are incomplete" in found.problems[0]
        assert "torch sees no CUDA device" in found.problems[1]
        assert all(each.verdict == "refused" for each in found.attention.backends)
        codes = {each.name: {reason.code for reason in each.reasons} for each in found.attention.backends}
        assert "device" in codes.pop("cpu")  # it is for CPUs alone
        assert all("device_missing" in found or "device" in found for found in codes.values())


class TestMachine:
    def test_native_kernels_are_there_or_the_reason_why_not(self, tmp_path, monkeypatch):
        monkeypatch.setattr(library, "FOLDER", tmp_path)
        found = machine.native_kernels()
        assert found.problem.code == "native_missing"
        assert found.problem.remedy == "with a C++ compiler, run python -m inference_shardformer.kernels.cpu.build"
        assert found.path == str(tmp_path / "_native.so")
        assert (found.isa_level, found.isa_levels) == ("", ())

    @pytest.mark.parametrize(("text", "quota"), [("max 100000", None), ("150000 100000", 1.5), ("", None)])
    def test_core_quota(self, tmp_path, text, quota):
        (tmp_path / "cpu.max").write_text(text)
        assert machine.core_quota(tmp_path) == quota
        assert machine.core_quota(tmp_path / "none") is None

    def test_memory_limit(self, tmp_path):
        assert machine.memory(tmp_path).limit is None
        (tmp_path / "memory.max").write_text("1024\n")
        assert machine.memory(tmp_path).limit == 1024
        assert machine.memory(tmp_path).total > 2**20

    def test_openmp_runtimes(self, tmp_path):
        names = [
            "/t/libgomp-24e2ab19.so.1.0.0",
            "/t/libiomp5.so",
            "/t/libomp.so",
            "/t/libgomp.so.1",
            "/t/libcomp.so",
            "/t/libgomp_doc.so",
        ]
        lines = [f"7f-80 r-xp 0 08:01 {place}   {name}" for place, name in enumerate([*names, names[0], "[heap]"])]
        (tmp_path / "maps").write_text("\n".join([*lines, "7f-80 rw-p 0 00:00 0"]))
        assert machine.openmp_runtimes(tmp_path / "maps") == tuple(sorted(names[:4]))
        assert machine.openmp_runtimes(tmp_path / "none") == ()

    def test_environment_has_the_launcher_threads_and_our_own(self):
        environ = {"OMP_NUM_THREADS": "2", "RANK": "0", "INFERENCE_SHARDFORMER_X": "1", "HOME": "/", "MASTER_PORT": ""}
        assert list(machine.environment(environ)) == ["RANK", "OMP_NUM_THREADS", "INFERENCE_SHARDFORMER_X"]


def test_a_store_that_cannot_be_reached_is_named(monkeypatch):
    def refuse(*_args, **_kwargs):
        raise OSError("connection refused")

    monkeypatch.setattr(exchange, "rendezvous", refuse)
    with pytest.raises(EnvironmentMismatchError, match="rank 1 cannot reach the launcher's store: connection refused"):
        exchange.Exchange(1, 2)


class TestCommand:
    def test_exit_code_and_json(self, capsys):
        assert main(["doctor", "--json"]) == 0
        document = json.loads(capsys.readouterr().out)
        assert document["can_serve"] is True
        assert document["ranks"][0]["attention"]["proof"]["outcome"] == "passed"

    def test_nothing_can_serve(self, capsys):
        assert main(["doctor", "--attention-backend", "spda"]) == 3
        assert "did you mean 'sdpa'?" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("words", "said"),
        [(["--model", "./missing"], "no such folder"), (["--tp", "0"], "shard.tp_size = 0"), (["--josn"], "--json")],
    )
    def test_bad_input(self, capsys, words, said):
        assert main(["doctor", *words]) == 2
        assert said in capsys.readouterr().err
