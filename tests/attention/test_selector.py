"""Which backend is chosen, which are refused and why, and what a backend must prove."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from attention_batches import Case

from inference_shardformer.attention.base import AttentionBackend, AttentionSpec, Reason
from inference_shardformer.attention.reference import ReferenceAttention
from inference_shardformer.attention.sdpa import SdpaAttention
from inference_shardformer.attention.selector import build, candidates, make_registry, select
from inference_shardformer.errors import BackendUnavailableError, CapacityError, PluginError
from inference_shardformer.plugins import Registry

SPEC = Case(()).spec(torch.float32)


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
def registry() -> Registry[type[AttentionBackend]]:
    """The built-in backends and nothing installed, whatever the machine has."""
    registry = make_registry()
    registry.names()
    return registry


class TestSelect:
    def test_auto_takes_the_first_that_can_serve(self, registry):
        selection = select(SPEC, "auto", registry)
        assert selection.name == "sdpa"
        assert [(verdict.name, verdict.reasons) for verdict in selection.verdicts] == [("sdpa", ()), ("reference", ())]

    def test_default_registry_serves(self):
        assert isinstance(build(select(SPEC, "auto"), SPEC), SdpaAttention)

    def test_a_name_is_used(self, registry):
        selection = select(SPEC, "reference", registry)
        assert selection.name == "reference"
        assert isinstance(build(selection, SPEC, registry), ReferenceAttention)

    def test_a_refused_name_is_never_replaced(self, registry):
        registry.register("picky", Picky)
        with pytest.raises(BackendUnavailableError, match=r"'picky' cannot serve.*not to its taste") as caught:
            select(SPEC, "picky", registry)
        assert "use head_dim 7" in caught.value.remedy
        assert "sdpa, reference" in caught.value.remedy

    def test_auto_passes_over_a_refusing_plugin_and_says_so(self, registry):
        registry.register("picky", Picky)
        selection = select(SPEC, "auto", registry)
        assert selection.name == "sdpa"
        explained = selection.explain()
        assert "attention backend sdpa (asked for: auto)" in explained
        assert "picky: head_dim 16 is not to its taste [mood]" in explained
        assert "reference: could serve" in explained

    def test_unknown_name_gets_a_suggestion_and_the_list(self, registry):
        with pytest.raises(BackendUnavailableError, match=r"did you mean 'sdpa'\? \(known: sdpa, reference\)"):
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
        assert candidates("cpu", registry) == ("sdpa", "alpha", "zeta", "reference")
        assert candidates("xpu", registry) == ("alpha", "sdpa", "zeta", "reference")

    def test_same_facts_same_selection(self, registry):
        assert select(SPEC, "auto", registry) == select(SPEC, "auto", registry)


class TestPlugins:
    @pytest.mark.parametrize(
        ("target", "words"),
        [
            ("no_such_module_at_all:Backend", "ModuleNotFoundError"),
            (int, "is not a subclass of AttentionBackend"),
            (FromTheFuture, "is written for contract 99, this is contract 1"),
        ],
    )
    def test_a_broken_plugin_is_a_verdict_until_asked_for(self, registry, target, words):
        registry.register("broken", target)
        verdict = select(SPEC, "auto", registry).verdicts[1]
        assert verdict.name == "broken"
        assert verdict.reasons[0].code == "plugin"
        assert words in verdict.reasons[0].message
        with pytest.raises(PluginError, match=words):
            select(SPEC, "broken", registry)


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


class TestProof:
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
