"""What the native decoder layers and the ends of their model take, as far as it stays the same over the steps."""

from __future__ import annotations

import torch

from inference_shardformer.attention.base import AttentionBackend
from inference_shardformer.compute.base import ComputeSpec
from inference_shardformer.compute.cpu_linear import ACTIVATIONS, PackedLinearWeight
from inference_shardformer.compute.decoder_layer import LayerParts, LinearPart, ModelEnds, NormPart
from inference_shardformer.compute.linear import LinearWeight
from inference_shardformer.compute.torch_kernels import PlainWeight
from inference_shardformer.kernels.cpu.arguments import DTYPES, RmsNormArgs, RotaryArgs
from inference_shardformer.kernels.cpu.decoder_layer import DecoderLayerArgs, ModelEndsArgs
from inference_shardformer.kernels.cpu.linear_arguments import LinearArgs, PackedEmbeddingArgs
from inference_shardformer.kernels.cpu.packed_weight import PackedWeight

_EPILOGUES = {"silu": 1, "gelu_tanh": 2}


def layer_arguments(parts: LayerParts, spec: ComputeSpec) -> DecoderLayerArgs:
    """Of one layer; the step, the cache and the ranks' group are for the caller to add."""
    attention, code = parts.backend.spec, DTYPES[spec.dtype]
    block_stride, slot_stride, head_stride, _ = _cache_strides(parts.backend)
    return DecoderLayerArgs(
        qkv=_linear(parts.qkv, code, norm=parts.attention_norm),
        o=_linear(parts.o, code, is_partial=parts.group.rank > 0),
        gate_up=_linear(parts.gate_up, code, norm=parts.mlp_norm, epilogue=_EPILOGUES[ACTIVATIONS[spec.activation]]),
        down=_linear(parts.down, code, is_partial=parts.group.rank > 0),
        rotary=RotaryArgs(
            num_heads=attention.num_heads,
            num_kv_heads=attention.num_kv_heads,
            head_dim=attention.head_dim,
            block_size=attention.block_size,
            block_stride=block_stride,
            slot_stride=slot_stride,
            head_stride=head_stride,
            dtype=code,
        ),
    )


def ends_arguments(ends: ModelEnds, spec: ComputeSpec) -> ModelEndsArgs:
    """Of the ends of a model. Raises `TypeError` for weights that are stored in another way."""
    code, hidden_size, (first, end) = DTYPES[spec.dtype], ends.embedding.shape.in_features, ends.vocab_range
    table = None if isinstance(ends.embedding, PlainWeight) else _packed(ends.embedding)
    arguments = ModelEndsArgs(
        embedding=PackedEmbeddingArgs(
            packed=None if table is None else table.storage_pointer,
            n=end - first,
            k=hidden_size,
            out_stride=hidden_size,
            first=first,
            dtype=code if table is None else table.dtype_code,
        ),
        table=ends.embedding.plain().data_ptr() if table is None else None,
        norm=RmsNormArgs(
            weight=ends.norm.weight.data_ptr(),
            size=hidden_size,
            eps=ends.norm.eps,
            weight_offset=1.0 if ends.norm.is_offset else 0.0,
            rounds_before_weight=not ends.norm.is_offset,
            dtype=code,
        ),
        head=_linear(ends.head, code),
        vocabulary=end - first,
    )
    arguments.head.out_dtype = DTYPES[torch.float32]
    return arguments


def _cache_strides(backend: AttentionBackend) -> tuple[int, ...]:
    """Of the keys of a layer by block, slot, head and element, in the layout that the backend works on."""
    spec, layout = backend.spec, backend.capabilities.kv_layout
    one_block = layout.arrange((1, spec.block_size, spec.num_kv_heads, spec.head_dim))
    return layout.as_nhd(torch.empty(one_block, device="meta")).stride()


def _linear(
    part: LinearPart, code: int, *, norm: NormPart | None = None, epilogue: int = 0, is_partial: bool = False
) -> LinearArgs:
    """The constant arguments of a projection. Of a sum over ranks, the first rank alone brings the bias."""
    packed = _packed(part.weight)
    arguments = LinearArgs(
        weight=packed.storage_pointer,
        scales=packed.scales_pointer,
        bias=None if part.bias is None or is_partial else part.bias.data_ptr(),
        n=packed.out_features,
        k=packed.in_features,
        group=packed.group_size,
        weight_dtype=packed.dtype_code,
        activation_dtype=code,
        out_dtype=code,
        segments=packed.segments,
        epilogue=epilogue,
    )
    if norm is not None:
        arguments.norm_weight = norm.weight.data_ptr()
        arguments.norm_eps = norm.eps
        arguments.norm_rounds = not norm.is_offset
        arguments.norm_offset = 1.0 if norm.is_offset else 0.0
    return arguments


def _packed(weight: LinearWeight) -> PackedWeight:
    if not isinstance(weight, PackedLinearWeight):
        raise TypeError(f"the native layer takes packed weights, not {type(weight).__name__}")
    return weight.packed
