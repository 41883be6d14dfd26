"""ColossalAI policies that place our modules. A policy of one's own derives from one of them and adds descriptions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from torch import nn

from inference_shardformer.bridges.colossalai.placing import NoPaddingModule, Placement
from inference_shardformer.bridges.colossalai.upstream import (
    LlamaForCausalLMPolicy,
    ModulePolicyDescription,
    Policy,
    ShardConfig,
    SubModuleReplacementDescription,
)
from inference_shardformer.errors import PolicyError, StateError

if TYPE_CHECKING:
    from inference_shardformer.policies.base import Policy as CorePolicy

Descriptions = dict[type[nn.Module] | str, ModulePolicyDescription]


class PlacesNoPadding:
    """What our policies do, whatever policy of ColossalAI they derive from.

    `core` is the policy of ours that plans the sharding; `None` stands for the one of the model's architecture. The
    methods that ColossalAI's own policies exchange (training forwards that switch the cache off) stay Hugging Face's.
    """

    model: nn.Module
    set_model: Callable[[nn.Module], None]
    set_shard_config: Callable[[ShardConfig], None]

    def __init__(self, core: CorePolicy | None = None) -> None:
        super().__init__()
        self.core = core
        self.placement: Placement | None = None

    def config_sanity_check(self) -> None:
        """Nothing is left to check: the plan was made before ModelSharder runs."""

    def preprocess(self) -> nn.Module:
        """The model as it is: vocabularies are padded by the plan."""
        return self.model

    def module_policy(self) -> Descriptions:
        """One description for each module that the plan exchanges, by the class names of their owners."""
        if self.placement is None:
            raise StateError(
                f"{type(self).__name__} has no plan: it does not serve ColossalAI's ShardFormer alone",
                remedy="pass it to ColossalInferenceShardformer.optimize(), which plans first",
            )
        return self.placement.descriptions()

    def append_or_create_submodule_replacement(
        self,
        description: SubModuleReplacementDescription | list[SubModuleReplacementDescription],
        policy: Descriptions,
        target_key: type[nn.Module] | str,
    ) -> Descriptions:
        """Add descriptions; one for a module that ours would exchange, or holds, takes that one's place."""
        added = description if isinstance(description, list) else [description]
        key = _known_key(policy, target_key)
        if key in policy:
            held = policy[key].sub_module_replacement or []
            kept = [each for each in held if not (_is_ours(each) and any(_overlap(each, other) for other in added))]
            policy[key].sub_module_replacement = [*kept, *added]
        else:
            policy[key] = ModulePolicyDescription(sub_module_replacement=added)
        return policy

    def postprocess(self) -> nn.Module:
        """The model; its weights are read after this."""
        return self.model


class InferencePolicy(PlacesNoPadding, Policy):
    """Places our modules in a model of any architecture that has a policy of ours."""


class LlamaInferencePolicy(PlacesNoPadding, LlamaForCausalLMPolicy):
    """The same, derived from ColossalAI's LlamaForCausalLMPolicy where transformers lets that be imported."""


def policy_of(model: nn.Module, core: CorePolicy | None) -> PlacesNoPadding:
    """The bridge's policy for a model."""
    return (LlamaInferencePolicy if type(model).__name__ == "LlamaForCausalLM" else InferencePolicy)(core)


def check_coverage(descriptions: Mapping[type[nn.Module] | str, ModulePolicyDescription], model: nn.Module) -> None:
    """Raise `PolicyError` for descriptions that ModelSharder would skip without a word.

    That is a class of which the model has no module, or only such as are exchanged as a whole before their turn comes.
    """
    gone: set[int] = set()
    for key, description in descriptions.items():
        found = [module for module in model.modules() if _is_of(module, key)]
        left = [module for module in found if id(module) not in gone]
        name = key if isinstance(key, str) else key.__name__
        if not found:
            raise PolicyError(
                f"the policy describes {name}, and the model has no module of exactly this class",
                remedy="name the class that type(module).__name__ gives; ModelSharder does not match subclasses",
            )
        if not left:
            raise PolicyError(
                f"the policy describes what is in {name}, which is exchanged as a whole before",
                remedy=f"describe the exchange of {name} itself, in the class that holds it",
            )
        for each in description.sub_module_replacement or []:
            if _is_ours(each):
                for owner in left:
                    gone.update(id(module) for module in _descendants(owner, each.suffix))


def _descendants(owner: nn.Module, suffix: str) -> list[nn.Module]:
    """A module within `owner` and everything in it; nothing where there is none."""
    path = suffix.replace("[", ".").replace("]", "")
    try:
        return list(owner.get_submodule(path).modules())
    except AttributeError:
        return []


def _is_of(module: nn.Module, key: type[nn.Module] | str) -> bool:
    """Whether ModelSharder finds the module under a key: by the exact class, or the name of it."""
    return type(module).__name__ == key if isinstance(key, str) else type(module) is key


def _known_key(policy: Descriptions, key: type[nn.Module] | str) -> type[nn.Module] | str:
    """The name of a class where the policy knows it by that."""
    name = key if isinstance(key, str) else key.__name__
    return name if name in policy else key


def _is_ours(description: SubModuleReplacementDescription) -> bool:
    return description.target_module is NoPaddingModule


def _overlap(first: SubModuleReplacementDescription, second: SubModuleReplacementDescription) -> bool:
    """Whether one suffix is the other, or lies within it."""
    a, b = f"{first.suffix}.", f"{second.suffix}."
    return a.startswith(b) or b.startswith(a)
