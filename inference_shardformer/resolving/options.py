"""Options of attention backends and policies: found by the plug-in's name, validated by what it declares."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import ValidationError

from inference_shardformer.attention.base import AttentionBackend
from inference_shardformer.attention.survey import BACKENDS
from inference_shardformer.config.effects import idle
from inference_shardformer.config.loader import MergedConfig
from inference_shardformer.config.option_steps import OPTIONS_KEY, DeclaresOptions
from inference_shardformer.config.plugin_options import ChosenOptions, DeclaredOptions, check_plugins, typed_options
from inference_shardformer.config.violations import ConfigViolations, Violation
from inference_shardformer.plugins import Registry
from inference_shardformer.policies.base import Policy
from inference_shardformer.policies.registry import POLICIES

BACKEND_OPTIONS = "inference.attention.options"
POLICY_OPTIONS = "shard.policy.options"
Backends = Registry[type[AttentionBackend]]


class OptionOwners:
    """Every plug-in that may have options: the registered backends and policies, and a policy that was given."""

    def __init__(self, backends: Backends = BACKENDS, policy: Policy | None = None) -> None:
        self._backends = backends
        self._policy = policy

    def __call__(self, field: str, name: str) -> DeclaredOptions:
        """The declaration of the plug-in `name` whose options stand in `field`.

        Raises `PluginError` for a name that nobody has, and for a plug-in that does not load.
        """
        if field == BACKEND_OPTIONS:
            return _declared("attention backend", field, name, self._backends.get(name))
        if self._policy is not None and self._policy.name == name:
            return _declared("policy", field, name, type(self._policy))
        return _declared("policy", field, name, POLICIES.get(name))


def check_options(
    merged: MergedConfig, registry: Backends = BACKENDS, *, policy: Policy | None = None
) -> list[Violation]:
    """Everything that is wrong with the options of any plug-in; `policy` is one that was given, not registered."""
    return check_plugins(merged, OptionOwners(registry, policy))


def idle_options(merged: MergedConfig, backends: Sequence[str], policy: Policy) -> list[Violation]:
    """Options of backends and policies that are not the chosen ones, which cannot take effect."""
    chosen = {BACKEND_OPTIONS: ("attention backend", backends), POLICY_OPTIONS: ("policy", (policy.name,))}
    return [
        idle(path, stack.winner.value, merged, f"the {kind} is {' + '.join(names)}", f"remove it, or name its {kind}")
        for field, (kind, names) in chosen.items()
        for path, stack in merged.stacks.items()
        if path.startswith(f"{field}.")
        and not path.startswith(tuple(f"{field}.{name}." for name in names))
        and not _is_version(path)
    ]


def chosen_options(merged: MergedConfig, chosen: str, registry: Backends = BACKENDS) -> ChosenOptions:
    """The options of the chosen backend. Raises `ConfigViolations` for what is wrong with them."""
    return typed_options(OptionOwners(registry)(BACKEND_OPTIONS, chosen), merged)


def bind_policy(policy: Policy, merged: MergedConfig) -> Policy:
    """The policy with its options. Where these are wrong, which `check_options` tells, its defaults stand in for them.

    Raises `ConfigViolations` if there is no default that could.
    """
    try:
        return policy.with_options(policy_options(merged, policy).typed)
    except ConfigViolations as wrong:
        try:
            return policy.with_options(policy.Options() if policy.Options else None)
        except ValidationError:
            raise ConfigViolations([*merged.violations, *wrong.violations]) from wrong


def policy_options(merged: MergedConfig, policy: Policy) -> ChosenOptions:
    """The options of the policy that is used. Raises `ConfigViolations` for what is wrong with them."""
    return typed_options(_declared("policy", POLICY_OPTIONS, policy.name, type(policy)), merged)


def _declared(kind: str, field: str, name: str, plugin: DeclaresOptions) -> DeclaredOptions:
    return DeclaredOptions(kind, name, f"{field}.{name}", plugin.Options, plugin.options_version, plugin.options_steps)


def _is_version(path: str) -> bool:
    return path.endswith(f".{OPTIONS_KEY}")
