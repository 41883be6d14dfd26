"""A decoder layer of LLaMA's shape that a kernel runs whole, or its modules one by one."""

from __future__ import annotations

import torch
from torch import nn

from inference_shardformer.attention.base import AttentionBackend, AttentionMetadata
from inference_shardformer.compute.decoder_layer import (
    DecoderLayerKernel,
    LayerFunction,
    LayerParts,
    LinearPart,
    ModelEnds,
    ModelFunction,
    NormPart,
    PositionEmbeddings,
)
from inference_shardformer.distributed.tensor_parallel import TensorParallelGroup
from inference_shardformer.layers.linear import ParallelLinear
from inference_shardformer.layers.norm import RMSNorm
from inference_shardformer.modeling.nopadding_llama import NoPaddingLlamaAttention, NoPaddingLlamaMLP


class NoPaddingDecoderLayer(nn.Module):
    """Norm, attention, residual, norm, MLP, residual. Keeps the call contract of Hugging Face's decoder layers.

    What runs it is bound when the weights are there, and anew when the attention backend is exchanged.
    `returns_tuple`: as older transformers expect. `attention_type`: what newer ones choose a mask by.
    """

    def __init__(
        self,
        *,
        self_attn: NoPaddingLlamaAttention,
        mlp: NoPaddingLlamaMLP,
        input_layernorm: RMSNorm,
        post_attention_layernorm: RMSNorm,
        num_layers: int,
        kernel: DecoderLayerKernel,
        group: TensorParallelGroup,
        returns_tuple: bool,
        attention_type: str,
    ) -> None:
        super().__init__()
        self.self_attn = self_attn
        self.mlp = mlp
        self.input_layernorm = input_layernorm
        self.post_attention_layernorm = post_attention_layernorm
        self.attention_type = attention_type
        self._num_layers = num_layers
        self._kernel = kernel
        self._group = group
        self._returns_tuple = returns_tuple
        self._run: LayerFunction = self.run_modules
        self.__dict__["backend"] = self_attn.backend

    @property
    def backend(self) -> AttentionBackend:
        """The attention backend of the layer. Whoever exchanges it binds the layer anew."""
        return self.__dict__["backend"]

    @backend.setter
    def backend(self, backend: AttentionBackend) -> None:
        self.__dict__["backend"] = backend
        self.weights_loaded()

    def weights_loaded(self) -> None:
        """Bind what runs the layer; its parameters keep their addresses from now on."""
        self._run = self._kernel.bind(self._parts()) or self.run_modules

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        position_embeddings: PositionEmbeddings,
        attn_metadata: AttentionMetadata,
        **_: object,
    ) -> torch.Tensor | tuple[torch.Tensor]:
        """`[1, num_tokens, hidden_size]` in and out, equal on every rank."""
        out = self._run(hidden_states, position_embeddings, attn_metadata)
        return (out,) if self._returns_tuple else out

    def bind_model(self, ends: ModelEnds) -> ModelFunction | None:
        """What runs all layers of this layer's kernel with the ends of their model, if it does that."""
        return self._kernel.bind_model(ends)

    def were_all_run(self, hidden_states: torch.Tensor) -> bool:
        """Whether this layer's call ran all that come after it, too: they would hand on what they are given."""
        return self._kernel.were_all_run(hidden_states)

    def run_modules(
        self, hidden_states: torch.Tensor, position_embeddings: PositionEmbeddings, attn_metadata: AttentionMetadata
    ) -> torch.Tensor:
        """The layer by its modules."""
        normed = self.input_layernorm(hidden_states)
        attended, _ = self.self_attn(normed, position_embeddings, attn_metadata=attn_metadata)
        normed, hidden_states = self.post_attention_layernorm.of_sum(attended, hidden_states)
        return hidden_states + self.mlp(normed)

    def _parts(self) -> LayerParts:
        return LayerParts(
            layer_idx=self.self_attn.layer_idx,
            num_layers=self._num_layers,
            hooks=(self._forward_hooks, self._forward_pre_hooks),
            attention_norm=norm_part(self.input_layernorm),
            mlp_norm=norm_part(self.post_attention_layernorm),
            qkv=linear_part(self.self_attn.qkv_proj),
            o=linear_part(self.self_attn.o_proj),
            gate_up=linear_part(self.mlp.gate_up_proj),
            down=linear_part(self.mlp.down_proj),
            backend=self.backend,
            group=self._group,
        )


def norm_part(module: RMSNorm) -> NormPart:
    """A norm as kernels take it."""
    return NormPart(module.weight, module.eps, module.is_offset)


def linear_part(module: nn.Module) -> LinearPart:
    """A projection as kernels take it. Raises `TypeError` for another module."""
    if not isinstance(module, ParallelLinear):
        raise TypeError(f"a {type(module).__name__} stands where the layer needs a parallel linear layer")
    return LinearPart(module.stored, module.bias)
