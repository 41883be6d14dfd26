"""Which policy serves which architecture."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from inference_shardformer.errors import PluginError, UnsupportedModelError
from inference_shardformer.plugins import Registry
from inference_shardformer.policies.baichuan import BaichuanPolicy
from inference_shardformer.policies.base import Policy
from inference_shardformer.policies.contract import CONTRACT_VERSION, policy_problem
from inference_shardformer.policies.gemma2 import Gemma2Policy
from inference_shardformer.policies.gemma3 import Gemma3Policy
from inference_shardformer.policies.gpt_neox import GPTNeoXPolicy
from inference_shardformer.policies.llama import LlamaPolicy
from inference_shardformer.policies.mistral import MistralPolicy
from inference_shardformer.policies.mixtral import MixtralPolicy
from inference_shardformer.policies.opt import OPTPolicy
from inference_shardformer.policies.phi3 import Phi3Policy
from inference_shardformer.policies.qwen2 import Qwen2Policy
from inference_shardformer.policies.qwen3 import Qwen3Policy
from inference_shardformer.policies.qwen3_moe import Qwen3MoePolicy

_BUILT_IN: tuple[type[Policy], ...] = (
    LlamaPolicy,
    BaichuanPolicy,
    Gemma2Policy,
    Gemma3Policy,
    GPTNeoXPolicy,
    MistralPolicy,
    MixtralPolicy,
    OPTPolicy,
    Phi3Policy,
    Qwen2Policy,
    Qwen3Policy,
    Qwen3MoePolicy,
)


def make_registry() -> Registry[type[Policy]]:
    """A registry with the built-in policies; installed plug-ins are found when its names are asked for."""
    registry: Registry[type[Policy]] = Registry(
        "policy", entry_point_group="inference_shardformer.policies", check=policy_problem
    )
    for policy in _BUILT_IN:
        registry.register(policy.name, policy)
    return registry


POLICIES = make_registry()
"""The registry that everything uses unless it is given another."""


def supported_architectures() -> tuple[str, ...]:
    """Architectures that have a built-in policy."""
    return tuple(name for policy in _BUILT_IN for name in policy.architectures)


def policy_for(architecture: str) -> Policy:
    """The policy of an architecture such as `LlamaForCausalLM`; `UnsupportedModelError` lists the known ones.

    Built-in policies come first. Plug-ins are asked, and imported, only where none of them serves; one that does not
    load is named, with its cause, if no other serves. Raises `PluginError` if two plug-ins claim the architecture.
    """
    for policy in _BUILT_IN:
        if architecture in policy.architectures:
            return policy()
    plugins, broken = _plugins()
    claims = {name: policy for name, policy in plugins.items() if architecture in policy.architectures}
    if len(claims) > 1:
        origins = " and by ".join(f"{name!r} from {POLICIES.origin(name)}" for name in claims)
        raise PluginError(
            f"{architecture} is claimed by the policy {origins}",
            remedy="uninstall one of the distributions, or pass policy= with the one you mean",
        )
    if claims:
        return next(iter(claims.values()))()
    known = ", ".join(dict.fromkeys((*supported_architectures(), *_architectures(plugins.values()))))
    raise UnsupportedModelError(
        "; ".join([f"no policy shards {architecture!r}; supported: {known}", *(each.message for each in broken)]),
        remedy="pass policy= with a Policy of your own, or use a supported model",
    ) from (broken[0] if broken else None)


def _plugins() -> tuple[dict[str, type[Policy]], list[PluginError]]:
    """The policies that installed distributions bring, by name, and why others cannot be used."""
    loaded: dict[str, type[Policy]] = {}
    broken: list[PluginError] = []
    for name in POLICIES.names():
        try:
            policy = POLICIES.get(name)
            if policy not in _BUILT_IN:
                _check_plugin(name, policy)
                loaded[name] = policy
        except PluginError as exc:
            broken.append(exc)
    return loaded, broken


def _check_plugin(name: str, policy: type[Policy]) -> None:
    """What a class of our own is spared: its name is that of its entry, and its contract is its own statement."""
    origin = POLICIES.origin(name)
    if policy.name != name:
        raise PluginError(
            f"policy {name!r} from {origin} calls itself {policy.name!r}",
            remedy=f"declare name = {name!r} on the class, or announce it under its own name",
        )
    foreign = [base for base in policy.__mro__ if not base.__module__.startswith("inference_shardformer.")]
    if POLICIES.import_path(name) is not None and not any("contract_version" in vars(base) for base in foreign):
        raise PluginError(
            f"policy {name!r} from {origin} broke its contract: it declares no contract_version",
            remedy=f"write contract_version = {CONTRACT_VERSION} on the class, the version that it was written for",
        )


def _architectures(policies: Iterable[type[Policy]]) -> Iterator[str]:
    for policy in policies:
        yield from policy.architectures
