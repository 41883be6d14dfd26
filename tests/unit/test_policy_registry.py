"""Policies that installed distributions bring: found by architecture, refused by name, in nobody's way."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from inference_shardformer.errors import PluginError, UnsupportedModelError
from inference_shardformer.policies import registry
from inference_shardformer.policies.llama import LlamaPolicy
from inference_shardformer.policies.registry import make_registry, policy_for, supported_architectures

GROUP = "inference_shardformer.policies"
SOURCE = """
from inference_shardformer.policies.llama import LlamaPolicy

class Policy(LlamaPolicy):
    name = {name!r}
    architectures = ({architecture!r},)
    {contract}
"""


def install(folder: Path, name: str, source: str, *, entry: str = "") -> None:
    """A distribution with one policy, as pip would leave it behind."""
    info = folder / f"{name}-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(f"[{GROUP}]\n{entry or name} = {name}_policy:Policy\n")
    (folder / f"{name}_policy.py").write_text(source)


def policy(name: str, architecture: str, contract: str = "contract_version = 1") -> str:
    return SOURCE.format(name=name, architecture=architecture, contract=contract)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder on the import path, before a registry of its own that has not looked there yet."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(registry, "POLICIES", make_registry())
    known = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - known:
        if name.endswith("_policy"):
            del sys.modules[name]


def test_a_plugin_is_found_by_its_architecture(site):
    install(site, "acme", policy("acme", "AcmeForCausalLM"))
    assert "acme" in registry.POLICIES.names()
    assert "acme_policy" not in sys.modules
    assert policy_for("AcmeForCausalLM").name == "acme"


def test_built_in_policies_come_first_and_import_no_plugin(site):
    install(site, "usurper", policy("usurper", "LlamaForCausalLM"))
    assert type(policy_for("LlamaForCausalLM")) is LlamaPolicy
    assert "usurper_policy" not in sys.modules


def test_two_that_claim_one_architecture_are_refused_with_both_origins(site):
    install(site, "first", policy("first", "AcmeForCausalLM"))
    install(site, "second", policy("second", "AcmeForCausalLM"))
    with pytest.raises(PluginError, match="AcmeForCausalLM is claimed by the policy") as caught:
        policy_for("AcmeForCausalLM")
    for origin in ("first_policy:Policy of first 1.2", "second_policy:Policy of second 1.2"):
        assert origin in caught.value.message


def test_a_name_that_is_taken_is_refused_with_both_origins(site):
    install(site, "imposter", policy("llama", "AcmeForCausalLM"), entry="llama")
    with pytest.raises(PluginError, match="'llama' is registered twice") as caught:
        policy_for("AcmeForCausalLM")
    assert "policies.llama:LlamaPolicy" in caught.value.message
    assert "of imposter 1.2" in caught.value.message


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("raise ImportError('no such library')", "failed to load: ImportError: no such library"),
        ("Policy = dict", "is not a subclass of Policy"),
        (policy("broken", "BrokenForCausalLM", ""), "it declares no contract_version"),
        (policy("broken", "BrokenForCausalLM", "contract_version = 9"), "is written for contract 9"),
        (policy("other", "BrokenForCausalLM"), "calls itself 'other'"),
    ],
    ids=["import", "no_policy", "undeclared", "newer", "misnamed"],
)
def test_one_that_cannot_be_used_is_named_and_in_nobodys_way(site, source, said):
    install(site, "broken", source)
    install(site, "acme", policy("acme", "AcmeForCausalLM"))
    assert policy_for("AcmeForCausalLM").name == "acme"
    with pytest.raises(UnsupportedModelError, match="no policy shards 'BrokenForCausalLM'") as caught:
        policy_for("BrokenForCausalLM")
    assert said in caught.value.message
    assert "of broken 1.2" in caught.value.message
    assert isinstance(caught.value.__cause__, PluginError)
    assert "AcmeForCausalLM" in caught.value.message  # what plug-ins serve is listed as well


def test_without_plugins_an_unknown_architecture_has_no_cause(site):
    with pytest.raises(UnsupportedModelError) as caught:
        policy_for("NobodyForCausalLM")
    assert caught.value.__cause__ is None
    assert all(name in caught.value.message for name in supported_architectures())
