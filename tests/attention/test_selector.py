"""Which backend is chosen, which are refused and why, and what a backend must prove."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import ClassVar

import pytest
import torch

from inference_shardformer.attention import selector
from inference_shardformer.attention.base import AttentionSpec, Reason
from inference_shardformer.attention.cpu import CpuAttention
from inference_shardformer.attention.reference import ReferenceAttention
from inference_shardformer.attention.sdpa import SdpaAttention
from inference_shardformer.attention.selector import Selection, Verdict, build, judge
from inference_shardformer.attention.survey import BACKENDS, BackendRegistry, Survey, make_registry, make_survey
from inference_shardformer.conformance.cases import MIXED, Case
from inference_shardformer.errors import BackendUnavailableError, CapacityError, PluginError
from inference_shardformer.kernels.cpu.library import NativeProblem
from inference_shardformer.plugins import Registry
from inference_shardformer.probing.requirement import Requirement

CPU = torch.device("cpu")
SPEC = Case(MIXED).spec(CPU)


def survey_of(registry: BackendRegistry, native: Reason | None = None) -> Survey:
    """This machine, with native kernels or the reason why there are none, whether it has them or not."""
    return replace(make_survey(CPU, registry), native=native)


def select(spec: AttentionSpec, requested: str, registry: BackendRegistry = BACKENDS) -> Selection:
    """Choose on this machine, as if it had native kernels."""
    return selector.select(spec, requested, survey_of(registry))


def _verdict(name: str, selection: Selection) -> Verdict:
    (found,) = (verdict for verdict in selection.verdicts if verdict.name == name)
    return found


def _in(shown: Collection[str], verdicts: Sequence[Verdict]) -> list[str]:
    return [verdict.name for verdict in verdicts if verdict.name in shown]


class Picky(ReferenceAttention):
    """Serves nothing."""

    name: ClassVar[str] = "picky"

    @classmethod
    def reasons(cls, spec: AttentionSpec) -> list[Reason]:
        return [Reason("mood", f"head_dim {spec.head_dim} is not to its taste", "use head_dim 7")]


class FromTheFuture(ReferenceAttention):
    """Written for another contract."""

    contract_version = 99


@pytest.fixture
def registry() -> BackendRegistry:
    """The built-in backends and nothing installed, whatever the machine has."""
    registry = make_registry()
    registry.names()
    return registry


class TestSelect:
    def test_auto_takes_the_first_that_can_serve(self, registry):
        selection = select(SPEC, "auto", registry)
        assert selection.name == "cpu"
        able = [verdict.name for verdict in selection.verdicts if not verdict.reasons]
        assert able == ["cpu", "sdpa", "reference"]

    def test_without_native_kernels_it_is_sdpa_and_the_verdict_says_why(self, registry):
        missing = Reason("native_build", "no compiler", "install g++")
        selection = selector.select(SPEC, "auto", survey_of(registry, missing))
        assert selection.name == "sdpa"
        assert selection.verdicts[0].reasons == (missing,)
        with pytest.raises(
            BackendUnavailableError, match=r"'cpu' cannot serve.*no compiler \[native_build\]"
        ) as caught:
            selector.select(SPEC, "cpu", survey_of(registry, missing))
        assert "install g++" in caught.value.remedy

    def test_a_survey_asks_the_library_that_is_there(self, registry, monkeypatch):
        problem = NativeProblem("native_missing", "never built", "build it")
        monkeypatch.setattr("inference_shardformer.attention.survey.native_problem", lambda: problem)
        assert make_survey(CPU, registry).native == Reason("native_missing", "never built", "build it")
        monkeypatch.setattr("inference_shardformer.attention.survey.native_problem", lambda: None)
        assert make_survey(CPU, registry).native is None

    def test_default_registry_serves(self):
        assert isinstance(build(selector.select(SPEC, "auto", make_survey(CPU)), SPEC), CpuAttention | SdpaAttention)

    def test_a_name_is_used(self, registry):
        selection = select(SPEC, "reference", registry)
        assert selection.name == "reference"
        assert isinstance(build(selection, SPEC, registry), ReferenceAttention)

    def test_a_refused_name_is_never_replaced(self, registry):
        registry.register("picky", Picky)
        with pytest.raises(BackendUnavailableError, match=r"'picky' cannot serve.*not to its taste") as caught:
            select(SPEC, "picky", registry)
        assert "use head_dim 7" in caught.value.remedy
        assert "cpu, sdpa, reference" in caught.value.remedy

    def test_auto_passes_over_a_refusing_plugin_and_says_so(self, registry):
        registry.register("picky", Picky)
        selection = select(SPEC, "auto", registry)
        assert selection.name == "cpu"
        explained = selection.explain()
        assert "attention backend cpu (asked for: auto)" in explained
        assert "picky: head_dim 16 is not to its taste [mood]" in explained
        assert "reference: could serve" in explained

    def test_unknown_name_gets_a_suggestion_and_the_list(self, registry):
        with pytest.raises(BackendUnavailableError, match=r"did you mean 'sdpa'\? \(known: sdpa, cpu, .*reference\)"):
            select(SPEC, "spda", registry)

    def test_nothing_can_serve(self, registry):
        spec = replace(SPEC, num_heads=7)
        with pytest.raises(BackendUnavailableError, match="no attention backend can serve") as caught:
            select(spec, "auto", registry)
        for words in ("sdpa: num_heads=7", "reference: num_heads=7", "[head_counts]"):
            assert words in caught.value.message
        assert caught.value.remedy.count("tensor-parallel size") == 1

    def test_a_refused_name_without_alternatives_promises_none(self, registry):
        with pytest.raises(BackendUnavailableError) as caught:
            select(replace(SPEC, num_heads=7), "sdpa", registry)
        assert "can serve" not in caught.value.remedy

    def test_plugins_stand_between_the_preferred_and_the_reference(self, registry):
        registry.register("zeta", Picky)
        registry.register("alpha", Picky)
        survey = survey_of(registry)
        shown = ("cpu", "sdpa", "alpha", "zeta", "reference")  # beside backends of ours for other devices
        assert _in(shown, judge(SPEC, survey)) == ["cpu", "sdpa", "alpha", "zeta", "reference"]
        assert judge(SPEC, survey)[-1].name == "reference"
        elsewhere = replace(SPEC, device=torch.device("xpu"))
        assert _in(shown, judge(elsewhere, survey)) == ["alpha", "cpu", "sdpa", "zeta", "reference"]

    def test_candidates_name_their_origin(self, registry):
        registry.register("picky", Picky, origin="a test")
        candidates = select(SPEC, "auto", registry).candidates()
        ours = "cpu (inference_shardformer.attention.cpu:CpuAttention), sdpa "
        assert candidates.startswith(f"{ours}(inference_shardformer.attention.sdpa:SdpaAttention), ")
        assert ", picky (a test), " in candidates

    def test_same_facts_same_selection(self, registry):
        assert select(SPEC, "auto", registry) == select(SPEC, "auto", registry)


class TestPlugins:
    @pytest.mark.parametrize(
        ("target", "words"),
        [
            ("no_such_module_at_all:Backend", r"failed to load: no_such_module_at_all is not installed \[missing\]"),
            (int, "is not a subclass of AttentionBackend"),
            (FromTheFuture, "is written for contract 99, this is contract 1"),
        ],
    )
    def test_a_broken_plugin_is_a_verdict_until_asked_for(self, registry, target, words):
        registry.register("broken", target)
        verdict = _verdict("broken", select(SPEC, "auto", registry))
        assert verdict.reasons[0].code == "plugin"
        assert re.search(words, verdict.reasons[0].message)
        with pytest.raises(PluginError, match=words):
            select(SPEC, "broken", registry)


GROUP = "inference_shardformer.attention_backends"
PLUGIN = """
from inference_shardformer.attention.reference import ReferenceAttention
from inference_shardformer.attention.base import Requirement

class Backend(ReferenceAttention):
    name = "plugged"
    requires = REQUIRES
"""


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Installs a plug-in of one module as pip would; returns what finds it."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def install(module: str, source: str) -> BackendRegistry:
        info = tmp_path / f"{module}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.2\n")
        (info / "entry_points.txt").write_text(f"[{GROUP}]\nplugged = {module}:Backend\n")
        (tmp_path / f"{module}.py").write_text(source)
        importlib.invalidate_caches()
        return make_registry()

    return install


class TestInstalledPlugins:
    def test_one_that_works_is_used(self, installed):
        registry = installed("good_plugin", PLUGIN.replace("REQUIRES", "()"))
        selection = select(SPEC, "plugged", registry)
        assert build(selection, SPEC, registry).name == "plugged"
        assert "entry point plugged = good_plugin:Backend of good_plugin 1.2" in selection.candidates()

    def test_one_that_would_crash_us_is_a_verdict(self, installed):
        registry = installed("crashing_plugin", "import os, time\nos.kill(os.getpid(), 11)\ntime.sleep(9)\n")
        verdict = _verdict("plugged", select(SPEC, "auto", registry))
        assert verdict.reasons[0].code == "plugin"
        assert "its import crashed with SIGSEGV" in verdict.reasons[0].message
        assert "crashing_plugin" not in sys.modules
        with pytest.raises(PluginError, match=r"of crashing_plugin 1.2 failed to load: .* crashed with SIGSEGV"):
            select(SPEC, "plugged", registry)

    def test_one_that_raises_says_what(self, installed):
        registry = installed("raising_plugin", "raise ImportError('undefined symbol: _ZN3c10')\n")
        with pytest.raises(PluginError, match=r"ImportError: undefined symbol: _ZN3c10 \[abi_mismatch\]"):
            select(SPEC, "plugged", registry)

    def test_one_that_fails_only_here_is_a_verdict_with_its_cause(self, installed):
        here_only = "import sys\nif 'pytest' in sys.modules: raise OSError('only here')\nBackend = object\n"
        registry = installed("moody_plugin", here_only)
        assert "OSError: only here" in _verdict("plugged", select(SPEC, "auto", registry)).reasons[0].message
        with pytest.raises(PluginError, match="OSError: only here") as caught:
            select(SPEC, "plugged", registry)
        assert isinstance(caught.value.__cause__, OSError)

    def test_one_without_its_library_is_refused_with_the_remedy(self, installed):
        requires = "(Requirement('no_such_library', 'pip install no-such-library'),)"
        registry = installed("hungry_plugin", PLUGIN.replace("REQUIRES", requires))
        with pytest.raises(BackendUnavailableError, match=r"no_such_library is not installed \[missing\]") as caught:
            select(SPEC, "plugged", registry)
        assert "pip install no-such-library" in caught.value.remedy


class TestSurvey:
    def test_our_own_backends_start_no_process(self, monkeypatch, registry):
        def started(*_args, **_kwargs):
            raise AssertionError("a process was started")

        monkeypatch.setattr(subprocess, "Popen", started)
        names = [candidate.name for candidate in make_survey(CPU, registry).candidates]
        assert names[:2] == ["sdpa", "cpu"]
        assert names[-1] == "reference"

    def test_a_library_for_another_device_is_not_probed(self, monkeypatch, registry):
        class NeedsCuda(Picky):
            name: ClassVar[str] = "needs_cuda"
            requires = (Requirement("json", "none", platforms=("cuda",)), Requirement("no_such_library", "none"))

        registry.register("needs_cuda", NeedsCuda)
        assert {requirement.module for requirement in make_survey(CPU, registry).probes} == {"no_such_library"}

    def test_a_device_that_is_not_there_has_nothing_probed(self, registry):
        class NeedsLibrary(Picky):
            name: ClassVar[str] = "needs_library"
            requires = (Requirement("no_such_library", "none"),)

        registry.register("needs_library", NeedsLibrary)
        assert make_survey(torch.device("cuda", 99), registry).probes == {}

    def test_what_is_imported_already_is_not_probed(self, monkeypatch):
        registry: BackendRegistry = Registry("attention backend")
        registry.register("here", f"{__name__}:Picky")
        monkeypatch.setitem(sys.modules, __name__, sys.modules.get(__name__) or sys.modules[Picky.__module__])
        monkeypatch.setattr(subprocess, "Popen", None)
        assert make_survey(CPU, registry).candidates[0].backend is Picky


class WrongScale(SdpaAttention):
    """Ignores the model's scale."""

    name: ClassVar[str] = "wrong_scale"

    def __init__(self, spec: AttentionSpec) -> None:
        super().__init__(replace(spec, scale=1.0))


class WrongSlots(SdpaAttention):
    """Writes keys and values one token late."""

    name: ClassVar[str] = "wrong_slots"

    def write(self, k, v, cache, meta):
        super().write(k.roll(1, 0), v.roll(1, 0), cache, meta)


class WrongDecode(SdpaAttention):
    """Spoils the last head of the second decode only."""

    name: ClassVar[str] = "wrong_decode"

    def attend(self, q, cache, meta):
        out = super().attend(q, cache, meta)
        out[1, -1] = torch.nan
        return out


class WrongDtype(SdpaAttention):
    """Returns another type than it was given."""

    name: ClassVar[str] = "wrong_dtype"

    def attend(self, q, cache, meta):
        return super().attend(q, cache, meta).double()


class Crashing(SdpaAttention):
    """Its library raises."""

    name: ClassVar[str] = "crashing"

    def plan(self, batch, kv_cache):
        raise OSError("undefined symbol: attend")


class OutOfSpace(SdpaAttention):
    """Raises one of our own errors."""

    name: ClassVar[str] = "out_of_space"

    def plan(self, batch, kv_cache):
        raise CapacityError("workspace of 9 bytes is too small")


class BreaksAtConstruction(SdpaAttention):
    """Its library is loaded when it is constructed, and raises."""

    name: ClassVar[str] = "breaks"

    def __init__(self, spec: AttentionSpec) -> None:
        raise ImportError("undefined symbol: build")


class TestProof:
    def test_a_constructor_that_raises_is_a_refusal_with_its_cause(self, registry):
        registry.register("breaks", BreaksAtConstruction)
        with pytest.raises(BackendUnavailableError, match="'breaks' could not be constructed: ImportError") as caught:
            build(select(SPEC, "breaks", registry), SPEC, registry)
        assert isinstance(caught.value.__cause__, ImportError)

    @pytest.mark.parametrize(
        ("backend", "words"),
        [
            (WrongScale, "by up to .* tokens are wrong"),
            (WrongSlots, "from the reference: by up to"),
            (WrongDecode, "by up to inf .* at decode token 1, head 5; 1 of 15 tokens are wrong"),
            (WrongDtype, r"it returned torch.float64 \(15, 6, 16\) for torch.float32 \(15, 6, 16\)"),
            (Crashing, "proof run: OSError: undefined symbol"),
        ],
        ids=lambda value: getattr(value, "name", ""),
    )
    def test_a_wrong_backend_is_refused(self, registry, backend, words):
        registry.register(backend.name, backend)
        with pytest.raises(BackendUnavailableError, match=f"'{backend.name}' .*{words}"):
            build(select(SPEC, backend.name, registry), SPEC, registry)

    def test_the_cause_of_a_crash_is_kept(self, registry):
        registry.register("crashing", Crashing)
        with pytest.raises(BackendUnavailableError) as caught:
            build(select(SPEC, "crashing", registry), SPEC, registry)
        assert isinstance(caught.value.__cause__, OSError)

    def test_our_own_errors_pass_unchanged(self, registry):
        registry.register("out_of_space", OutOfSpace)
        with pytest.raises(CapacityError, match="9 bytes"):
            build(select(SPEC, "out_of_space", registry), SPEC, registry)

    @pytest.mark.parametrize("name", ["sdpa", "reference"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("block_size", [1, 7, 16, 256])
    @pytest.mark.parametrize("window", [None, 1, 6])
    def test_built_in_backends_prove_themselves(self, registry, name, dtype, block_size, window):
        spec = replace(SPEC, dtype=dtype, block_size=block_size, sliding_window=window, head_dim=64, scale=0.125)
        assert build(select(spec, name, registry), spec, registry).name == name
