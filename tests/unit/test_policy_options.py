"""A policy with options of its own: set at every level, typed before it is asked anything, explained and agreed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
from pydantic import BaseModel, ConfigDict, Field
from tiny_models import save_tiny_model, tiny_model

from inference_shardformer import ConfigSources, InferenceShardformer, ShardConfig, explain
from inference_shardformer.config.option_steps import OptionsStep
from inference_shardformer.config.violations import ConfigViolations
from inference_shardformer.errors import UnsupportedModelError
from inference_shardformer.policies.base import Policy, policy_name
from inference_shardformer.policies.contract import policy_problem
from inference_shardformer.policies.llama import LlamaPolicy
from inference_shardformer.policies.registry import POLICIES, policy_for
from inference_shardformer.resolving.preparation import agreed_facts

CONTEXT = "shard.policy.options.narrow.context"


class NarrowPolicy(LlamaPolicy):
    """Trusts its family with fewer tokens."""

    contract_version: ClassVar[int] = 1

    class Options(BaseModel):
        model_config = ConfigDict(frozen=True, extra="forbid")
        context: int = Field(default=99, ge=1, le=200, description="Tokens.")
        mode: str = "plain"

    options_version: ClassVar[int] = 2
    options_steps: ClassVar = {1: OptionsStep("nothing of note")}

    def facts(self, hf_config):
        """The facts, with the context cut."""
        return replace(super().facts(hf_config), max_position_embeddings=self.options.context)


class NeedyPolicy(NarrowPolicy):
    """Cannot do without an option."""

    class Options(BaseModel):
        model_config = ConfigDict(frozen=True, extra="forbid")
        context: int


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    save_tiny_model("gqa", path)
    return path


def told(folder: Path, *sets: str, policy: Policy | None = None, **kwargs: object) -> dict[str, dict]:
    sources = ConfigSources(environ={}, sets=sets)
    document = explain(folder, sources=sources, policy=policy or NarrowPolicy(), **kwargs).to_json()
    return {item["path"]: item for item in document["values"]}


def test_they_are_typed_before_the_policy_is_asked(folder):
    assert told(folder)["inference.max_model_len"]["value"] == 99
    values = told(folder, "policy.options.narrow.context=64")
    assert values["inference.max_model_len"]["value"] == 64
    assert (values[CONTEXT]["value"], values[CONTEXT]["origin"]) == (64, f"option --set {CONTEXT[6:]}=64")
    assert values["shard.policy.options.narrow.mode"]["origin"] == "default"


def test_every_level_says_and_the_highest_wins(folder, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("shard: {policy: {options: {narrow: {context: 10, mode: file, options_version: 2}}}}\n")
    environ = {"INFERENCE_SHARDFORMER_SHARD__POLICY__OPTIONS__NARROW__CONTEXT": "20"}
    called = ShardConfig(policy={"options": {"narrow": {"context": 40}}})
    sources = ConfigSources(files=(file,), environ=environ, sets=(f"{CONTEXT}=30",))
    policy = NarrowPolicy()
    with InferenceShardformer(called, sources=sources) as shardformer:
        shardformer.optimize(tiny_model("gqa"), policy)
        prepared = shardformer._prepared
        item = prepared.config.decision(CONTEXT)
        assert [str(each.origin).split()[0] for each in item.beaten] == ["option", "variable", "file"]
        assert (item.value, str(item.origin)) == (40, "call argument")
        assert prepared.policy.options == NarrowPolicy.Options(context=40, mode="file")
        assert agreed_facts(prepared)[CONTEXT] == "40"
        assert prepared.config.max_model_len == 40
    assert policy.options is None  # the policy that was given stays as it is


@pytest.mark.parametrize(
    ("setting", "rule", "remedy"),
    [
        ("context=0", "an integer, at least 1, at most 200", "leave it out"),
        ("contxt=3", "the name of an option of policy narrow: context, mode", "narrow.context?"),
        ("options_version=1", "the current 2 of policy narrow; this is older", "migrate FILE"),
        ("options_version=3", "at most 2, the version of the installed policy narrow", "upgrade"),
        ("options_version=x", "an integer from 1 to 2", "options_version: 2"),
    ],
)
def test_what_is_wrong_is_told_with_everything_else(folder, setting, rule, remedy):
    with pytest.raises(ConfigViolations) as caught:
        told(folder, f"policy.options.narrow.{setting}", "cache.block_size=0", "max_model_len=100")
    found = {violation.path: violation for violation in caught.value.violations}
    path = f"shard.policy.options.narrow.{setting.partition('=')[0]}"
    assert set(found) == {path, "inference.cache.block_size", "inference.max_model_len"}
    assert rule in found[path].rule
    assert remedy in found[path].remedy
    assert str(found[path].origin) == f"option --set policy.options.narrow.{setting}"


def test_without_a_default_nothing_can_be_asked(folder):
    with pytest.raises(ConfigViolations) as caught:
        told(folder, "cache.block_size=0", policy=NeedyPolicy())
    paths = [violation.path for violation in caught.value.violations]
    assert paths == ["inference.cache.block_size", "shard.policy.options.needy.context"]


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("llama.x=1", "policy llama takes no options"),
        ("narow.context=3", "unknown policy 'narow'"),
    ],
)
def test_options_of_others_are_refused(folder, setting, said):
    with pytest.raises(ConfigViolations, match=said):
        told(folder, f"policy.options.{setting}")


def test_options_of_a_policy_that_is_not_used_cannot_take_effect(folder, monkeypatch):
    monkeypatch.setitem(POLICIES._entries, "narrow", POLICIES._entries["llama"].__class__(NarrowPolicy, "test"))
    with pytest.raises(ConfigViolations, match="can take effect, but the policy is llama"):
        told(folder, f"{CONTEXT}=3", policy=LlamaPolicy())


def test_a_preset_cannot_set_them(folder):
    class Presetting(NarrowPolicy):
        def preset(self, facts):
            return {"shard.policy.options.presetting.context": 3}

    with pytest.raises(ConfigViolations, match="left out of a preset"):
        told(folder, policy=Presetting())


def test_a_model_is_not_needed(monkeypatch):
    monkeypatch.setitem(POLICIES._entries, "narrow", POLICIES._entries["llama"].__class__(NarrowPolicy, "test"))
    document = explain(sources=ConfigSources(environ={}, sets=(f"{CONTEXT}=3",))).to_json()
    assert {item["path"]: item["value"] for item in document["values"]}[CONTEXT] == 3


@pytest.mark.parametrize(
    ("name", "expected"),
    [("LlamaPolicy", "llama"), ("GPTNeoXPolicy", "gpt_neo_x"), ("Qwen3MoePolicy", "qwen3_moe"), ("OPTPolicy", "opt")],
)
def test_a_name_is_the_class_in_snake_case(name, expected):
    assert policy_name(name) == expected


@pytest.mark.parametrize(
    ("declared", "problem"),
    [
        ({"Options": dict}, "not a subclass of pydantic"),
        ({"Options": BaseModel}, "frozen=True"),
        ({"options_version": 0}, "not an integer from 1 on"),
        ({"options_version": 3}, "needs: 1, 2"),
        ({"options_steps": {1: "later"}}, "are no OptionsStep"),
        ({"contract_version": 2}, "is written for contract 2"),
        ({"architectures": "LlamaForCausalLM"}, "not a tuple of names"),
    ],
)
def test_a_declaration_that_is_none_breaks_the_contract(declared, problem):
    assert policy_problem(NarrowPolicy) is None
    assert problem in policy_problem(type("Broken", (NarrowPolicy,), declared))


def test_what_is_no_policy_breaks_the_contract():
    assert "not a subclass of Policy" in policy_problem(dict)
    assert "does not implement facts, table" in policy_problem(type("Empty", (Policy,), {}))


def test_a_plugin_serves_its_architecture_and_a_broken_one_is_named(monkeypatch):
    entry = POLICIES._entries["llama"].__class__
    other = type("OtherPolicy", (NarrowPolicy,), {"architectures": ("OtherForCausalLM",)})
    monkeypatch.setitem(POLICIES._entries, "broken", entry("no_such_module:X", "test"))
    monkeypatch.setitem(POLICIES._entries, "misnamed", entry(NarrowPolicy, "test"))
    monkeypatch.setitem(POLICIES._entries, "other", entry(other, "test"))
    assert type(policy_for("OtherForCausalLM")) is other
    with pytest.raises(UnsupportedModelError, match=r"'broken' from test failed to load.*'misnamed' .* calls itself"):
        policy_for("NobodyForCausalLM")
