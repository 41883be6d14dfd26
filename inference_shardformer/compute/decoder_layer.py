"""The contract of decoder-layer kernels: a whole layer in one call, in place of its modules one by one."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sized
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch

from inference_shardformer.attention.base import AttentionBackend, AttentionMetadata
from inference_shardformer.compute.base import ComputeKernel, ComputeKind
from inference_shardformer.compute.linear import LinearWeight
from inference_shardformer.distributed.tensor_parallel import TensorParallelGroup

PositionEmbeddings = tuple[torch.Tensor, torch.Tensor]  # cos and sin, each [1, num_tokens, rotary_dim]
LayerFunction = Callable[[torch.Tensor, PositionEmbeddings, AttentionMetadata], torch.Tensor]
"""`[1, num_tokens, hidden_size]` in and out, equal on every rank."""


class Angles(NamedTuple):
    """cos and sin of rotary embeddings, each `[num_rows, rotary_dim]`.

    With `positions` `[1, num_tokens]` the row of a token is that of its position, else tokens have rows in their order.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    positions: torch.Tensor | None


class ModelResult(NamedTuple):
    """What a model makes of a step.

    `greatest` are value and place of each row's greatest logit, padding left out; the place is -1 where the value is
    not finite.
    """

    logits: torch.Tensor  # float32 [num_logits, vocabulary on this rank]
    greatest: tuple[torch.Tensor, torch.Tensor]  # float32 and int64 [num_logits]


ModelFunction = Callable[[torch.Tensor, Angles, AttentionMetadata, torch.Tensor], ModelResult | None]
"""Token ids `[1, num_tokens]`, angles, the plan, and the indices of the tokens after which logits are wanted.

A result is overwritten by the next one. `None` where somebody watches a layer, or where layers are not bound alike:
then nothing has been done.
"""


@dataclass(frozen=True)
class NormPart:
    """A root-mean-square norm; see `NormKernel`."""

    weight: torch.Tensor  # [hidden_size]
    eps: float
    is_offset: bool


@dataclass(frozen=True)
class LinearPart:
    """A projection of this rank."""

    weight: LinearWeight
    bias: torch.Tensor | None  # [out_features]


@dataclass(frozen=True)
class LayerParts:
    """A layer of LLaMA's shape, loaded: two norms, four projections, attention, and where partial sums are added.

    One of `hooks` is not empty while somebody wants to see what goes in and out of this layer.
    """

    layer_idx: int
    num_layers: int
    hooks: tuple[Sized, ...]
    attention_norm: NormPart
    mlp_norm: NormPart
    qkv: LinearPart
    o: LinearPart
    gate_up: LinearPart
    down: LinearPart
    backend: AttentionBackend
    group: TensorParallelGroup


@dataclass(frozen=True)
class ModelEnds:
    """What stands before and behind layers of LLaMA's shape, loaded; `vocab_range` are the ids that this rank holds."""

    embedding: LinearWeight
    vocab_range: tuple[int, int]
    norm: NormPart
    head: LinearPart


class DecoderLayerKernel(ComputeKernel):
    """Runs layers whole, or leaves them to their modules."""

    kind: ClassVar[ComputeKind] = ComputeKind.DECODER_LAYER
    runs_whole: ClassVar[bool]

    def were_all_run(self, hidden_states: torch.Tensor) -> bool:
        """Whether `hidden_states`, which a layer just returned, is what all layers have made of the step."""
        return False

    @abstractmethod
    def bind(self, parts: LayerParts) -> LayerFunction | None:
        """What runs one layer; `None` leaves it to its modules. Called anew when the layer's backend is exchanged."""

    def bind_model(self, ends: ModelEnds) -> ModelFunction | None:
        """What runs all bound layers with the ends of their model; `None` leaves the ends to their modules."""
        return None
