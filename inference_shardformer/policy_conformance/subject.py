"""PolicySubject: the policy on trial with the models that its author gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from inference_shardformer.config.model import ModelFacts
from inference_shardformer.policies.base import Policy
from inference_shardformer.sharded import plan_ranks
from inference_shardformer.sharding.plan import ShardingPlan

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

MakePolicy = Callable[[], Policy]
MakeConfig = Callable[[], "PreTrainedConfig"]
MakeModel = Callable[["PreTrainedConfig"], "PreTrainedModel"]
_SEED = 0


@dataclass(frozen=True)
class PolicySubject:
    """A policy class or another callable that gives a policy, the configurations to try it on, and how to build them.

    `tp_sizes` are tried where the policy allows them.
    """

    make: MakePolicy
    configs: Mapping[str, MakeConfig]
    make_model: MakeModel
    tp_sizes: tuple[int, ...]

    def policy(self) -> Policy:
        """A policy as its author makes it."""
        return self.make()

    def model(self, case: str) -> PreTrainedModel:
        """The unsharded model of one configuration, with random weights."""
        return self.make_model(self.configs[case]())

    def facts(self, case: str) -> ModelFacts:
        """What the policy reads from one configuration."""
        return self.policy().facts(self.configs[case]())

    def plans(self, case: str, tp_size: int) -> list[ShardingPlan]:
        """The plan of every rank. Raises `PolicyError` where there is none."""
        return plan_ranks(self.policy(), self.facts(case), self.model(case), tp_size=tp_size)


def spread_model(hf_config: PreTrainedConfig) -> PreTrainedModel:
    """A model with random weights in fp32, spread so wide that no greedy choice is a near-tie, and no bias is zero."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(_SEED)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(hf_config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
            else:
                parameter.copy_(torch.randn_like(parameter) * (0.5 if parameter.dim() == 1 else 0.2))
    return model
