"""The kit for policies: each defect fails the check that is about it, and a sound policy fails none."""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import pytest
from family_models import family_config
from tiny_models import tiny_config

from inference_shardformer.conformance.verdicts import ConformanceFailure
from inference_shardformer.errors import PolicyError
from inference_shardformer.modeling.nopadding_llama import NoPaddingLlamaMLP
from inference_shardformer.policies.decoder import LlamaShapedPolicy
from inference_shardformer.policies.gpt_neox import GPTNeoXPolicy
from inference_shardformer.policies.llama import LlamaPolicy
from inference_shardformer.policies.mixtral import MixtralPolicy
from inference_shardformer.policies.rows import gate_up, replace, row
from inference_shardformer.policy_conformance.forwards import choices_of
from inference_shardformer.policy_conformance.subject import PolicySubject, spread_model
from inference_shardformer.policy_conformance.suite import policy_trials


class Sound(LlamaPolicy):
    """Nothing is wrong with it."""

    contract_version = 1


class Undeclared(LlamaPolicy):
    """Does not say which contract it was written for."""


class Boastful(Sound):
    """Announces what it was never tried on."""

    architectures: ClassVar[tuple[str, ...]] = ("LlamaForCausalLM", "OtherForCausalLM")


class Dreaming(Sound):
    """Counts a layer too many."""

    def facts(self, hf_config):
        from dataclasses import replace as changed

        facts = super().facts(hf_config)
        return changed(facts, num_layers=facts.num_layers + 1)


class Permissive(Sound):
    """Refuses no number of ranks."""

    def tp_size_problem(self, facts, tp_size):
        return None


class Mute(Sound):
    """Knows what is impossible, and does not say so."""

    def check_tp_size(self, facts, tp_size):
        return None


class Crossed(Sound):
    """Takes up for gate."""

    def mlp_rows(self, path):
        *others, _, down = super().mlp_rows(path)
        return (*others, gate_up(f"{path}.gate_up_proj", "up_proj", "gate_proj"), down)


class Hesitant(NoPaddingLlamaMLP):
    """Chooses in its forward."""

    def forward(self, x, *args):
        if self.act_fn.__class__.__name__ == "Never":
            return x
        return super().forward(x, *args)


class Hesitating(Sound):
    """Builds modules that choose."""

    def mlp_rows(self, path):
        _, *others = super().mlp_rows(path)

        def build(native, children, context):
            return Hesitant(act_fn=native.act_fn, **children)

        return (replace(path, native_class="LlamaMLP", build=build), *others)


class Incomplete(Sound):
    """Forgets a row."""

    def mlp_rows(self, path):
        first, second, _ = super().mlp_rows(path)
        return first, second


def failed(policy, configs=None) -> set[str]:
    """Names of the checks that fail, at one and two ranks."""
    configs = {"gqa": partial(tiny_config, "gqa")} if configs is None else configs
    found = set()
    for trial in policy_trials(PolicySubject(policy, configs, spread_model, (1, 2))):
        try:
            trial.body()
        except (ConformanceFailure, PolicyError):
            found.add(trial.check)
    return found


@pytest.mark.parametrize(
    ("policy", "checks"),
    [
        (Sound, set()),
        (Undeclared, {"declares_its_contract"}),
        (Boastful, {"declares_its_contract"}),
        (Dreaming, {"facts_are_those_of_the_model"}),
        (Permissive, {"impossible_sizes_are_refused"}),
        (Mute, {"impossible_sizes_are_refused"}),
        (Crossed, {"verifies"}),
        (Hesitating, {"forwards_choose_nothing"}),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_a_defect_fails_its_own_check(policy, checks):
    assert failed(policy) == checks


def test_a_row_that_is_missing_fails_whatever_needs_the_plan():
    assert "plan_covers_every_parameter" in failed(Incomplete)


@pytest.mark.parametrize(("policy", "case"), [(MixtralPolicy, "mixtral"), (GPTNeoXPolicy, "gpt_neox")])
def test_other_families_pass(policy, case):
    assert failed(policy, {case: partial(family_config, case)}) == {"declares_its_contract"}  # ours need not state it


def test_without_a_configuration_of_its_architecture_it_is_not_tried():
    assert "declares_its_contract" in failed(Sound, {"mixtral": partial(family_config, "mixtral")})


def test_a_forward_may_compute():
    assert choices_of(NoPaddingLlamaMLP) == []
    assert choices_of(Hesitant) == ["a comparison with 'Never'"]


def test_the_shape_of_the_defects_is_that_of_the_family():
    rows = LlamaPolicy().mlp_rows("model.layers.*.mlp")
    assert isinstance(LlamaPolicy(), LlamaShapedPolicy)
    assert [type(each) for each in rows] == [
        type(replace("a", native_class="B", build=None)),
        type(row("a")),
        type(row("a")),
    ]
