"""The contract of decoder-layer kernels: a whole layer in one call, in place of its modules one by one."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch

from inference_shardformer.attention.base import AttentionBackend, AttentionMetadata
from inference_shardformer.compute.base import ComputeKernel, ComputeKind
from inference_shardformer.compute.linear import LinearWeight
from inference_shardformer.distributed.tensor_parallel import TensorParallelGroup

PositionEmbeddings = tuple[torch.Tensor, torch.Tensor]  # cos and sin, each [1, num_tokens, rotary_dim]
LayerFunction = Callable[[torch.Tensor, PositionEmbeddings, AttentionMetadata], torch.Tensor]
"""`[1, num_tokens, hidden_size]` in and out, equal on every rank."""


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

    `is_watched` says whether somebody's hooks want to see what goes in and out of this layer.
    """

    layer_idx: int
    num_layers: int
    is_watched: Callable[[], bool]
    attention_norm: NormPart
    mlp_norm: NormPart
    qkv: LinearPart
    o: LinearPart
    gate_up: LinearPart
    down: LinearPart
    backend: AttentionBackend
    group: TensorParallelGroup


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
