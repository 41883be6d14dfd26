"""Subject: the model that is verified, unsharded in fp32, and the ways to its weights and to its shards."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from inference_shardformer.config.model import ModelFacts
from inference_shardformer.errors import UnsupportedModelError
from inference_shardformer.huggingface import architecture_of, load_hf_config, locate_checkpoint
from inference_shardformer.policies.base import Policy
from inference_shardformer.policies.registry import policy_for
from inference_shardformer.sharded import plan_ranks, planned_tensors
from inference_shardformer.sharding.checkpoint import SafetensorsCheckpoint, StateDictSource
from inference_shardformer.sharding.plan import ShardingPlan, TensorInfo
from inference_shardformer.sharding.stored import stored_views
from inference_shardformer.sharding.weights import WeightSource

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from inference_shardformer.shardformer import InferenceShardformer


@dataclass(frozen=True)
class Subject:
    """What is verified. `folder` is its checkpoint; `None` for a model that was given in memory."""

    name: str
    native: PreTrainedModel
    policy: Policy
    facts: ModelFacts
    folder: Path | None

    @classmethod
    def of(cls, model: PreTrainedModel | str | Path, policy: Policy | None) -> Subject:
        """Read a checkpoint, or take a model in memory, which stays as it is.

        Raises `CheckpointError`, `UnsupportedModelError`, or what the policy's `facts` refuses.
        """
        if isinstance(model, nn.Module):
            native = clone(model).float().eval()
            architecture, folder = type(model).__name__, None
        else:
            folder = locate_checkpoint(model)
            architecture = architecture_of(load_hf_config(folder, trust_remote_code=False))
            native = _load(folder, architecture)
        chosen = policy or policy_for(architecture)
        if chosen.Options is not None and chosen.options is None:
            chosen = chosen.with_options(chosen.Options())  # what a configuration gives that sets none of them
        facts = chosen.facts(native.config)
        return cls(architecture if folder is None else str(model), native, chosen, facts, folder)

    def tensors(self) -> Mapping[str, TensorInfo]:
        """The tensors that a plan must cover, by the checkpoint's names."""
        return planned_tensors(self.policy, self.facts, self.native)

    def plans(self, tp_size: int) -> list[ShardingPlan]:
        """The plan of every rank."""
        return plan_ranks(self.policy, self.facts, self.native, tp_size=tp_size)

    def source(self) -> WeightSource:
        """Where the true weights come from; to be closed if it can be."""
        if self.folder is not None:
            return SafetensorsCheckpoint(self.folder)
        state = self.native.state_dict()
        infos = {name: TensorInfo(tuple(tensor.shape), str(tensor.dtype)) for name, tensor in state.items()}
        return StateDictSource(stored_views(self.policy.stored(infos), state))

    def shard(self, shardformer: InferenceShardformer) -> PreTrainedModel:
        """This rank's model, in the way that a user would get it."""
        if self.folder is not None:
            return shardformer.from_pretrained(self.folder, policy=self.policy)
        return shardformer.optimize(clone(self.native), self.policy)[0]


def clone(model: PreTrainedModel) -> PreTrainedModel:
    """A model of its own modules and parameters over the same memory, so that sharding it costs the shards alone."""
    aliases = {id(each): nn.Parameter(each.detach(), requires_grad=False) for each in model.parameters()}
    return copy.deepcopy(model, dict[int, object](aliases))


def _load(folder: Path, architecture: str) -> PreTrainedModel:
    import transformers

    model_class = getattr(transformers, architecture, None)
    if model_class is None:
        raise UnsupportedModelError(
            f"transformers {transformers.__version__} has no class {architecture!r}",
            remedy="upgrade transformers, or correct `architectures` in config.json",
        )
    with torch.device("cpu"):
        return cast("PreTrainedModel", model_class.from_pretrained(folder)).float().eval()
