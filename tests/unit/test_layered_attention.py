"""Attention for each layer: layers of other needs get backends, plans and layouts of their own, and say so."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from switchable_backends import TransposedAttention, TunableAttention, switchable_registry
from tiny_models import ragged_prompts
from windowed_models import WINDOWS, WindowedLlamaPolicy, greedy, plain_backends, windowed_config, windowed_model

from inference_shardformer import (
    InferenceConfig,
    InferenceEngine,
    InferenceShardformer,
    SamplingParams,
    ShardConfig,
    explain,
)
from inference_shardformer.attention import selector
from inference_shardformer.attention.base import AttentionSpec, Feature
from inference_shardformer.attention.groups import LayerGroups, layer_ranges
from inference_shardformer.attention.reference import ReferenceAttention
from inference_shardformer.attention.sdpa import SdpaAttention
from inference_shardformer.attention.survey import BACKENDS, make_survey
from inference_shardformer.attention.verdicts import from_bytes, to_bytes, verdicts_of
from inference_shardformer.config.model import ModelFacts
from inference_shardformer.config.sources import ConfigSources
from inference_shardformer.errors import BackendUnavailableError, PolicyError
from inference_shardformer.explaining.backends import merge_ranks
from inference_shardformer.kv_cache.layout import KVLayout
from inference_shardformer.sharding.plan import RankLayout

CPU = torch.device("cpu")
NOTHING = ConfigSources(environ={})
MAX_NEW_TOKENS = 12
GREEDY = SamplingParams(max_new_tokens=MAX_NEW_TOKENS, ignore_eos=True)
PROMPTS = ragged_prompts(6, 160, longest=24)
SPEC = AttentionSpec(4, 2, 8, 8**-0.5, torch.float32, CPU, 4)
NO_WINDOW = SdpaAttention.capabilities.features - {Feature.SLIDING_WINDOW}


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    model = windowed_model()
    tokens = [greedy(model, prompt, MAX_NEW_TOKENS) for prompt in PROMPTS]
    unwindowed = [greedy(model, prompt, MAX_NEW_TOKENS, windows=(None,) * 4) for prompt in PROMPTS]
    assert sum(one != other for one, other in zip(tokens, unwindowed, strict=True)) > 3
    return tokens


def config(backend: str = "auto") -> InferenceConfig:
    return InferenceConfig.model_validate(
        {
            "dtype": "fp32",
            "attention": {"backend": backend},
            "cache": {"block_size": 4, "num_blocks": 26},
            "scheduler": {"max_num_seqs": 6, "max_num_batched_tokens": 16},
        }
    )


def serve(backend: str = "auto") -> tuple[InferenceShardformer, InferenceEngine]:
    torch.set_num_threads(1)
    shardformer = InferenceShardformer(ShardConfig(device="cpu"), config(backend), sources=NOTHING)
    model, _ = shardformer.optimize(windowed_model(), WindowedLlamaPolicy())
    return shardformer, shardformer.attach(model)


def bound(shardformer: InferenceShardformer) -> list[str]:
    """The name of the backend that each attention module holds; equal needs share one object."""
    modules = [layer.self_attn for layer in shardformer.sharded.model.model.layers]
    assert modules[0].backend is modules[2].backend
    assert modules[1].backend is modules[3].backend
    assert modules[0].backend is not modules[1].backend
    assert [module.backend.spec.sliding_window for module in modules] == list(WINDOWS)
    return [module.backend.name for module in modules]


def generated(engine: InferenceEngine) -> list[list[int]]:
    return [list(output.token_ids) for output in engine.generate(PROMPTS, GREEDY)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint without weights."""
    folder, config = tmp_path_factory.mktemp("windowed"), windowed_config()
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BACKENDS, "_entries", plain_backends())


@pytest.fixture
def mixed(monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` takes sdpa for whole layers, and a backend of the other layout for those with a window."""
    monkeypatch.setattr(SdpaAttention, "capabilities", replace(SdpaAttention.capabilities, features=NO_WINDOW))
    monkeypatch.setattr(selector, "_PREFERRED", {"cpu": ("sdpa", "transposed")})
    BACKENDS.register("transposed", TransposedAttention)


class TestEngine:
    @pytest.mark.parametrize("backend", ["auto", "reference"])
    def test_tokens_are_those_of_hugging_face(self, expected, backend):
        shardformer, engine = serve(backend)
        with shardformer:
            assert set(bound(shardformer)) == {"sdpa" if backend == "auto" else backend}
            assert generated(engine) == expected

    def test_layers_of_several_backends_and_layouts(self, expected, mixed):
        shardformer, engine = serve()
        with shardformer:
            assert bound(shardformer) == ["sdpa", "transposed"] * 2
            assert engine.kv_cache.layouts == (KVLayout.NHD, KVLayout.HND) * 2
            assert generated(engine) == expected
            decision = engine.config.current.config.decision("inference.attention.backend")
            assert decision.value == "sdpa + transposed"
            assert decision.reason == "layers 0,2: sdpa; layers 1,3: transposed"

    def test_options_reach_the_backends_of_every_group(self, mixed, monkeypatch):
        monkeypatch.setattr(selector, "_PREFERRED", {"cpu": ("sdpa", "tunable")})
        BACKENDS.register("tunable", TunableAttention)
        asked = config().model_dump(exclude_unset=True)
        asked["attention"]["options"] = {"tunable": {"splits": 3}}
        inference = InferenceConfig.model_validate(asked)
        with InferenceShardformer(ShardConfig(device="cpu"), inference, sources=NOTHING) as shardformer:
            model, _ = shardformer.optimize(windowed_model(), WindowedLlamaPolicy())
            assert bound(shardformer) == ["sdpa", "tunable"] * 2
            assert model.model.layers[3].self_attn.backend.options.splits == 3
            paths = {each.path: each.value for each in shardformer.explain().decisions}
            assert paths["inference.attention.options.tunable.splits"] == 3

    def test_every_backend_plans_once_a_step(self, monkeypatch):
        planned: list[int | None] = []
        plan = ReferenceAttention.plan
        monkeypatch.setattr(
            ReferenceAttention,
            "plan",
            lambda self, *args: planned.append(self.spec.sliding_window) or plan(self, *args),
        )
        shardformer, engine = serve("reference")
        with shardformer:
            planned.clear()
            engine.add_request([1, 2, 3], GREEDY)
            engine.step()
            engine.step()
        assert planned == [None, WINDOWS[1]] * 2

    def test_a_backend_that_misses_one_group_is_refused_with_its_layers(self, mixed):
        with pytest.raises(BackendUnavailableError) as caught:
            serve("sdpa")
        assert "layers 1,3 (8 heads, 4 key/value heads, head_dim 8, float32, window 6)" in str(caught.value)
        assert "layers 0,2" not in str(caught.value)
        assert "sliding" in str(caught.value)
        assert "transposed" in caught.value.remedy

    def test_none_for_one_group_is_refused_with_its_layers(self, monkeypatch):
        for backend in (SdpaAttention, ReferenceAttention):
            monkeypatch.setattr(backend, "capabilities", replace(backend.capabilities, features=NO_WINDOW))
        with pytest.raises(BackendUnavailableError, match=r"layers 1,3 \(.*\): no attention backend can serve"):
            serve()

    def test_an_unknown_name_is_said_once(self):
        with pytest.raises(BackendUnavailableError) as caught:
            serve("sdap")
        assert str(caught.value).count("unknown attention backend") == 1
        assert "layers" not in str(caught.value)

    def test_a_proof_that_fails_names_the_layers(self, monkeypatch):
        attend = SdpaAttention.attend

        def wrong_with_window(self: SdpaAttention, *args: object) -> torch.Tensor:
            return attend(self, *args) * (1.5 if self.spec.sliding_window else 1)

        monkeypatch.setattr(SdpaAttention, "attend", wrong_with_window)
        with pytest.raises(BackendUnavailableError, match=r"layers 1,3 \(.*\): .*differs from the reference"):
            serve("sdpa")


class TestSwitch:
    @pytest.fixture
    def served(self) -> Iterator[tuple[InferenceShardformer, InferenceEngine]]:
        shardformer, engine = serve()
        registry = switchable_registry()
        registry.register("unwindowed", Unwindowed)
        shardformer._switch._registry = registry
        with shardformer:
            yield shardformer, engine

    def test_all_groups_change_mid_generation(self, served, expected):
        shardformer, engine = served
        for index, prompt in enumerate(PROMPTS):
            engine.add_request(prompt, GREEDY, request_id=str(index))
        tokens, step, turns = {}, 0, ("transposed", "reference", "sdpa")
        while engine.has_unfinished():
            if step % 2:
                name = turns[step // 2 % 3]
                assert engine.switch_backend(name).is_done
                assert set(bound(shardformer)) == {name}
                assert engine.kv_cache.layouts == engine._runner.attention.kv_layouts
                assert {group.selection.name for group in shardformer.explain().attention} == {name}
            tokens.update({output.request_id: list(output.token_ids) for output in engine.step()})
            step += 1
        assert [tokens[str(index)] for index in range(len(PROMPTS))] == expected

    def test_one_group_that_cannot_be_served_refuses_the_switch(self, served, expected):
        shardformer, engine = served
        before = [layer.self_attn.backend for layer in shardformer.sharded.model.model.layers]
        with pytest.raises(BackendUnavailableError, match=r"layers 1,3 \(.*window 6\)"):
            engine.switch_backend("unwindowed")
        after = [layer.self_attn.backend for layer in shardformer.sharded.model.model.layers]
        assert all(old is new for old, new in zip(before, after, strict=True))
        assert generated(engine) == expected

    def test_a_failure_while_binding_is_undone_in_all_groups(self, served, monkeypatch, expected):
        shardformer, engine = served
        bind, calls = engine._runner.bind, []

        def fail_once(*args: object) -> None:
            calls.append(bound(shardformer))
            if len(calls) == 1:
                raise OSError("the device is gone")
            bind(*args)

        monkeypatch.setattr(engine._runner, "bind", fail_once)
        with pytest.raises(BackendUnavailableError, match="the device is gone"):
            engine.switch_backend("transposed")
        assert calls == [["transposed"] * 4, ["sdpa"] * 4]
        assert generated(engine) == expected

    def test_from_several_backends_to_one(self, mixed, expected):
        shardformer, engine = serve()
        with shardformer:
            kept = shardformer.sharded.model.model.layers[1].self_attn.backend
            engine.switch_backend("transposed")
            assert bound(shardformer) == ["transposed"] * 4
            assert shardformer.sharded.model.model.layers[1].self_attn.backend is kept
            assert engine.config["inference.attention.backend"] == "transposed"
            assert generated(engine) == expected


class Unwindowed(ReferenceAttention):
    """Serves whole layers alone."""

    name = "unwindowed"
    capabilities = replace(ReferenceAttention.capabilities, features=NO_WINDOW)


class TestExplanation:
    def test_live_and_offline_say_the_same(self, folder, mixed):
        shardformer, _ = serve()
        with shardformer:
            live = shardformer.explain()
        offline = explain(folder, ShardConfig(device="cpu"), config(), sources=NOTHING, policy=WindowedLlamaPolicy())
        assert live.to_json()["attention"] == offline.to_json()["attention"]
        assert live.verdicts() == offline.verdicts()

    def test_every_group_with_every_candidate_and_its_reasons(self, folder, mixed):
        sources, policy = NOTHING, WindowedLlamaPolicy()
        found = explain(folder, ShardConfig(device="cpu", tp_size=2), config(), sources=sources, policy=policy)
        whole, windowed = found.to_json()["attention"]["groups"]
        assert (whole["layers"], whole["ranks"], whole["chosen"]) == ([0, 2], [0, 1], "sdpa")
        assert (windowed["layers"], windowed["ranks"], windowed["chosen"]) == ([1, 3], [0, 1], "transposed")
        assert (windowed["spec"]["sliding_window"], "sliding_window" in whole["spec"]) == ("6", False)
        assert {each["name"]: each["verdict"] for each in whole["candidates"]}["transposed"] == "could serve"
        refused = {each["name"]: each["reasons"] for each in windowed["candidates"]}["sdpa"]
        assert [sorted(reason) for reason in refused] == [["code", "message", "remedy"]]
        rows = found.verdicts()
        assert rows[0] == ("attention backends (asked for: auto)", "verdict")
        assert ("layers 0,2 on ranks 0-1", "4 heads, 2 key/value heads, head_dim 8, float32") in rows
        place = rows.index(("layers 1,3 on ranks 0-1", "4 heads, 2 key/value heads, head_dim 8, float32, window 6"))
        told = dict(rows[place:])
        assert told["  transposed"] == "chosen"
        assert "[feature_sliding_window]" in told["  sdpa"]
        assert "layers 1,3 on ranks 0-1" in str(found)

    def test_ranks_that_say_the_same_are_one_group(self):
        groups = LayerGroups.of([SPEC, replace(SPEC, sliding_window=6)])
        survey = make_survey(CPU)
        usual = verdicts_of(groups, [selector.select(spec, "auto", survey) for spec in groups.specs])
        named = [selector.select(spec, "reference", survey) for spec in groups.specs]
        other = (usual[0], verdicts_of(groups, named)[1])
        assert from_bytes(to_bytes(other)) == other
        merged = [
            (group.found.layers, group.ranks, group.selection.name) for group in merge_ranks([usual, other, usual])
        ]
        assert merged == [((0,), (0, 1, 2), "sdpa"), ((1,), (0, 2), "sdpa"), ((1,), (1,), "reference")]
        rows = [row for group in merge_ranks([usual, other, usual]) for row in group.rows()]
        assert [name for name, _ in rows if name.startswith("layer ")] == [
            "layer 0 on ranks 0-2",
            "layer 1 on ranks 0,2",
            "layer 1 on rank 1",
        ]

    def test_what_is_no_verdict_is_refused(self):
        with pytest.raises(ValueError, match="layers"):
            from_bytes(b'[{"spec": {}}]')


class TestGroups:
    def test_equal_specs_share_a_group_in_order_of_their_first_layers(self):
        windowed = replace(SPEC, sliding_window=8)
        groups = LayerGroups.of([windowed, SPEC, windowed, replace(SPEC)])
        assert groups == LayerGroups((windowed, SPEC), (0, 1, 0, 1))
        assert (groups.layers(1), groups.num_layers, groups.named(0)) == ((1, 3), 4, "layers 0,2")

    @pytest.mark.parametrize(
        ("layers", "text"),
        [
            ((0,), "0"),
            ((0, 1), "0-1"),
            (range(30), "0-29"),
            ((0, 2, 4), "0,2,4"),
            (range(1, 42, 2), "1,3,...,41"),
            (range(5, 62, 6), "5,11,...,59"),
            ((0, 1, 2, 4, 6, 7), "0-2,4,6-7"),
        ],
    )
    def test_layers_in_few_words(self, layers, text):
        assert layer_ranges(tuple(layers)) == text

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"num_kv_heads": 4}, "num_kv_heads 4 instead of 2"),
            ({"head_dim": 16}, "head_dim 16 instead of 8"),
            ({"block_size": 8}, "block_size 8 instead of 4"),
            ({"kv_dtype": torch.bfloat16}, "type bfloat16 instead of float32"),
        ],
    )
    def test_what_one_cache_cannot_hold_is_refused(self, changes, said):
        with pytest.raises(PolicyError, match=said) as caught:
            LayerGroups.of([SPEC, SPEC, replace(SPEC, **changes)])
        assert "layer 2 asks" in str(caught.value)
        assert LayerGroups.of([SPEC, replace(SPEC, num_heads=8, softcap=2.0)]).num_layers == 2

    def test_a_model_without_layers_is_refused(self):
        with pytest.raises(PolicyError, match="no attention layer"):
            LayerGroups.of([])


class TestPolicy:
    def test_facts_reach_the_specs(self):
        policy = WindowedLlamaPolicy()
        facts = replace(
            policy.facts(windowed_config()), attention_scale=0.5, attention_softcap=30.0, attention_sinks=True
        )
        spec = groups_of(policy, facts).specs[1]
        assert (spec.sliding_window, spec.scale, spec.softcap, spec.sinks) == (6, 0.5, 30.0, True)
        assert spec.in_words().endswith("float32, window 6, softcap 30, scale 0.5, sinks")

    def test_windows_for_another_number_of_layers_are_refused(self):
        policy = WindowedLlamaPolicy()
        facts = replace(policy.facts(windowed_config()), sliding_windows=(None, 6))
        with pytest.raises(PolicyError, match="2 sliding windows for 4 layers"):
            groups_of(policy, facts)

    def test_a_policy_that_one_cache_cannot_hold_is_refused_before_sharding(self, monkeypatch):
        spec_of = WindowedLlamaPolicy.attention_spec

        def uneven(self: WindowedLlamaPolicy, *args: object, layer_idx: int, **given: object) -> AttentionSpec:
            spec = spec_of(self, *args, layer_idx=layer_idx, **given)
            return replace(spec, head_dim=16) if layer_idx == 3 else spec

        monkeypatch.setattr(WindowedLlamaPolicy, "attention_spec", uneven)
        with pytest.raises(PolicyError, match="layer 3 asks the cache for head_dim 16 instead of 8"):
            serve()


def groups_of(policy: WindowedLlamaPolicy, facts: ModelFacts) -> LayerGroups:
    return policy.attention_groups(facts, RankLayout(1, 0), dtype=torch.float32, device=CPU, block_size=4)
