"""What a policy is: facts of a model, a table of rows, and the tensor-parallel sizes it allows."""

from __future__ import annotations

import copy
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, Protocol

import torch
from pydantic import BaseModel
from torch import nn

from inference_shardformer.attention.base import AttentionBackend, AttentionSpec
from inference_shardformer.attention.groups import LayerGroups
from inference_shardformer.attention.layered import LayeredAttention
from inference_shardformer.compute.bound import ComputeKernels
from inference_shardformer.config.model import ModelFacts
from inference_shardformer.config.option_steps import OptionsSteps
from inference_shardformer.distributed.tensor_parallel import TensorParallelGroup
from inference_shardformer.errors import PolicyError, TensorParallelSizeError
from inference_shardformer.policies.adapters import NO_ADAPTERS, Adapters
from inference_shardformer.sharding.plan import ModulePlan, RankLayout, TensorInfo
from inference_shardformer.sharding.planner import ReplaceRow, StyleRow
from inference_shardformer.sharding.stored import StoredTensor, as_it_is
from inference_shardformer.sharding.styles import rank_heads

if TYPE_CHECKING:
    from transformers import PreTrainedConfig
    from typing_extensions import Self


@dataclass(frozen=True)
class BuildContext:
    """Everything a module needs, bound at construction. Backends and kernels were selected and proven before."""

    facts: ModelFacts
    hf_config: PreTrainedConfig
    group: TensorParallelGroup
    attention: LayeredAttention
    kernels: ComputeKernels
    vocab_range: tuple[int, int]

    def backend_of(self, layer_idx: int) -> AttentionBackend:
        """The attention backend of one layer; its module keeps it as an attribute."""
        return self.attention.of(layer_idx)


class ParallelFactory(Protocol):
    """Builds the module of one planned path."""

    def __call__(self, module: ModulePlan, native: nn.Module | None, context: BuildContext) -> nn.Module:
        """`native` is what stands at the path now; fused modules have none."""


class ReplacementFactory(Protocol):
    """Builds the module that takes a native one's place, of the planned children below it."""

    def __call__(self, native: nn.Module, children: Mapping[str, nn.Module], context: BuildContext) -> nn.Module:
        """`children` are keyed by their path below the native module."""


@dataclass(frozen=True)
class StyleEntry:
    """A table row that cuts modules over ranks, and what is built for them."""

    row: StyleRow
    build: ParallelFactory


@dataclass(frozen=True)
class ReplaceEntry:
    """A table row that exchanges modules of one exact native class."""

    row: ReplaceRow
    native_class: str | None  # None: the factory itself decides what it exchanges
    build: ReplacementFactory


PolicyEntry = StyleEntry | ReplaceEntry


class Policy(ABC):
    """How one family of models is sharded. Never changed; the plan it leads to is data.

    `adapters` says what becomes of module classes of the user's own; a class nobody named is refused, never skipped.

    `name` is the class's in snake case, without `Policy`, unless the class declares another. A policy with settings of
    its own declares them as `Options`, a frozen pydantic model that forbids extra names. Users set them as
    `shard.policy.options.<name>.<option>`; `options` is an instance of it before any method below is called.
    """

    name: ClassVar[str]
    contract_version: ClassVar[int] = 1
    architectures: ClassVar[tuple[str, ...]]
    can_capture: ClassVar[bool] = False  # no module of a step reads on the host what the device computed
    layer_shape: ClassVar[str] = ""  # "llama": decoder layers that a kernel for LLaMA's can run whole
    model_shape: ClassVar[str] = ""  # "llama": embedding, rotary embedding, layers, norm and head, and nothing else
    has_experts: ClassVar[bool] = False  # its MLPs are NoPaddingMoE, which a kernel may serve
    rotary: ClassVar[str] = ""  # "halves": its attention is a NoPaddingRotaryAttention, which a kernel may serve
    Options: ClassVar[type[BaseModel] | None] = None
    options_version: ClassVar[int] = 1  # grows when an option is renamed, dropped or means something else
    options_steps: ClassVar[OptionsSteps] = MappingProxyType({})  # the step that leaves each older version
    options: BaseModel | None = None

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        if "name" not in vars(cls):
            cls.name = policy_name(cls.__name__)

    def __init__(self, adapters: Adapters = NO_ADAPTERS) -> None:
        self.adapters = adapters

    def with_options(self, options: BaseModel | None) -> Self:
        """This policy with the options that the configuration gives it. Called before every other method."""
        bound = copy.copy(self)
        bound.options = options
        return bound

    def adapting(
        self, native_class: type[nn.Module], build: ReplacementFactory, *, rows: tuple[PolicyEntry, ...] = ()
    ) -> Self:
        """This policy, with `build` for modules of exactly `native_class`; `rows` plan its extra parameters."""
        return type(self)(self.adapters.adapting(native_class, build, rows))

    def leaving_out(self, native_class: type[nn.Module]) -> Self:
        """This policy, with modules of exactly `native_class` left as they are, whole on the rank.

        Their `forward` must take `attn_metadata`. Raises `PolicyError` otherwise.
        """
        return type(self)(self.adapters.leaving_out(native_class))

    @abstractmethod
    def facts(self, hf_config: PreTrainedConfig) -> ModelFacts:
        """Read the facts of a model, refusing by name what this policy does not serve."""

    @abstractmethod
    def table(self, facts: ModelFacts) -> tuple[PolicyEntry, ...]:
        """The rows: module-name pattern to style, or to the module that replaces it."""

    def full_table(self, facts: ModelFacts) -> tuple[PolicyEntry, ...]:
        """The table, and the rows that the adapters bring."""
        return (*self.table(facts), *self.adapters.rows)

    def preset(self, facts: ModelFacts) -> Mapping[str, object]:
        """Values by full path that suit this family better than the defaults; files and everything above beat them.

        Only `inference.*` may be preset, and of that neither `inference.weights.*` nor `inference.strict`.
        """
        return {}

    def stored(self, tensors: Mapping[str, TensorInfo]) -> tuple[StoredTensor, ...]:
        """How a checkpoint keeps the tensors of the unsharded model: as they are, unless a family says otherwise."""
        return tuple(as_it_is(name) for name in tensors)

    def optional_tensors(self, facts: ModelFacts) -> frozenset[str]:
        """Checkpoint tensors that may be present or absent without meaning anything."""
        return frozenset({"lm_head.weight"}) if facts.tie_word_embeddings else frozenset()

    def tp_size_problem(self, facts: ModelFacts, tp_size: int) -> str | None:
        """Why this tensor-parallel size is impossible, or `None`."""
        heads, kv_heads = facts.total_num_heads, facts.total_num_kv_heads
        if heads % tp_size:
            return f"num_attention_heads={heads} is not a multiple of {tp_size}"
        if kv_heads % tp_size and tp_size % kv_heads:
            return f"num_key_value_heads={kv_heads} neither divides {tp_size} nor is divided by it"
        if facts.intermediate_size % tp_size:
            return f"intermediate_size={facts.intermediate_size} is not a multiple of {tp_size}"
        return None

    def check_tp_size(self, facts: ModelFacts, tp_size: int) -> None:
        """Refuse an impossible tensor-parallel size, naming the possible ones and why."""
        problem = self.tp_size_problem(facts, tp_size)
        if problem is not None:
            legal = [n for n in range(1, facts.total_num_heads + 1) if self.tp_size_problem(facts, n) is None]
            raise TensorParallelSizeError(
                f"tp_size={tp_size} is impossible for this {facts.architecture}: {problem}",
                remedy=f"use one of {', '.join(map(str, legal))}: each divides the attention heads and the MLP, and "
                "divides the key/value heads or is a multiple of them",
            )

    def attention_spec(
        self,
        facts: ModelFacts,
        layout: RankLayout,
        *,
        layer_idx: int,
        dtype: torch.dtype,
        device: torch.device,
        block_size: int,
    ) -> AttentionSpec:
        """What an attention backend must serve in one layer on this rank; layers of equal specs share a backend."""
        return AttentionSpec(
            num_heads=rank_heads(facts.total_num_heads, *layout)[1],
            num_kv_heads=rank_heads(facts.total_num_kv_heads, *layout)[1],
            head_dim=facts.head_dim,
            scale=facts.head_dim**-0.5 if facts.attention_scale is None else facts.attention_scale,
            dtype=dtype,
            device=device,
            block_size=block_size,
            sliding_window=facts.sliding_windows[layer_idx] if facts.sliding_windows else None,
            softcap=facts.attention_softcap,
            sinks=facts.attention_sinks,
        )

    def attention_groups(
        self, facts: ModelFacts, layout: RankLayout, *, dtype: torch.dtype, device: torch.device, block_size: int
    ) -> LayerGroups:
        """The specs of all layers on this rank. Raises `PolicyError` where they do not fit one cache, or the facts."""
        windows, num_layers = facts.sliding_windows, facts.num_layers
        if windows and len(windows) != num_layers:
            raise PolicyError(
                f"the facts of this {facts.architecture} name {len(windows)} sliding windows for {num_layers} layers",
                remedy="let the policy's facts() name one for each layer, None where there is none, or none at all",
            )
        return LayerGroups.of(
            self.attention_spec(facts, layout, layer_idx=layer_idx, dtype=dtype, device=device, block_size=block_size)
            for layer_idx in range(num_layers)
        )


def policy_name(class_name: str) -> str:
    """The name of a policy by that of its class: `GPTNeoXPolicy` is `gpt_neo_x`."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", class_name.removesuffix("Policy"))
    return words.lower()
