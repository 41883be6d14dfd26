"""The native decoder layers: each of them, or all, in one call, on one team of threads."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import ClassVar
from weakref import WeakKeyDictionary, WeakValueDictionary, ref

import torch

from inference_shardformer.attention.base import AttentionBackend, AttentionMetadata
from inference_shardformer.attention.cpu import CpuAttention, CpuMetadata
from inference_shardformer.attention.spec import Reason
from inference_shardformer.compute.base import ComputeCapabilities, ComputeSpec
from inference_shardformer.compute.cpu_linear import ACTIVATIONS, PackedLinearWeight
from inference_shardformer.compute.decoder_layer import (
    DecoderLayerKernel,
    LayerFunction,
    LayerParts,
    LinearPart,
    NormPart,
    PositionEmbeddings,
)
from inference_shardformer.kernels.cpu.arguments import DTYPES, RotaryArgs
from inference_shardformer.kernels.cpu.decoder_layer import (
    DecoderLayerArgs,
    DecoderLayersArgs,
    LayerStep,
    LayerWorkspace,
)
from inference_shardformer.kernels.cpu.library import native
from inference_shardformer.kernels.cpu.linear_arguments import LinearArgs
from inference_shardformer.kv_cache.cache import PagedKVCache

_EPILOGUES = {"silu": 1, "gelu_tanh": 2}
_NEEDED = {"attention": ("cpu",), "linear": ("cpu",), "activation": ("fused",), "all_reduce": ("none", "shm")}


class CpuDecoderLayer(DecoderLayerKernel):
    """Runs layers of LLaMA's shape whole, where everything in them is native."""

    name: ClassVar[str] = "cpu"
    contract_version: ClassVar[int] = 1
    runs_whole: ClassVar[bool] = True
    capabilities: ClassVar[ComputeCapabilities] = ComputeCapabilities(devices=("cpu",), needs_native=True)

    def __init__(self, spec: ComputeSpec) -> None:
        super().__init__(spec)
        self._workspace = LayerWorkspace()
        self._chain = _Chain()
        self._steps: WeakKeyDictionary[AttentionBackend, _Step] = WeakKeyDictionary()

    @classmethod
    def extra_reasons(cls, spec: ComputeSpec) -> list[Reason]:
        """Layers of another shape, and choices that are not native."""
        found = []
        if spec.layer_shape != "llama":
            message = "the model's decoder layers are not of LLaMA's shape"
            found.append(Reason("layer_shape", message, "nothing is wrong: their modules run one by one"))
        for choice, names in _NEEDED.items():
            chosen = spec.chosen.get(choice, "")
            if chosen not in names:
                message = f"it needs {choice} by {' or '.join(names)}, and that is by {chosen or 'nothing'}"
                found.append(Reason("choices", message, f"let {choice} be chosen by auto"))
        return found

    def were_all_run(self, hidden_states: torch.Tensor) -> bool:
        """Whether one native call ran them."""
        return self._chain.is_result(hidden_states)

    def bind(self, parts: LayerParts) -> LayerFunction | None:
        """The layer as one call; `None` while another attention backend serves it, or sums are not shared memory's.

        Once every layer is bound, and to one backend, the first call of a step runs them all.
        """
        self._chain.pop(parts.layer_idx)
        is_summed = parts.group.size == 1 or parts.group.shared_sums is not None
        if not (isinstance(parts.backend, CpuAttention) and is_summed):
            return None
        step = self._steps.setdefault(parts.backend, _Step(self._workspace))
        layer = _BoundLayer(parts, self.spec, step, self._chain)
        self._chain.add(layer)
        return layer.run


class _Step:
    """What the layers of one attention backend share in a step; filled by the first of them."""

    def __init__(self, workspace: LayerWorkspace) -> None:
        self._workspace = workspace
        self._meta: Callable[[], AttentionMetadata | None] = _nothing
        self._kept: PositionEmbeddings | None = None
        self.arguments = LayerStep()
        self.threads = 1

    def is_of(self, meta: AttentionMetadata) -> bool:
        """Whether this is the step that `meta` was planned for."""
        return self._meta() is meta

    def begin(
        self, layer: DecoderLayerArgs, num_tokens: int, position_embeddings: PositionEmbeddings, meta: AttentionMetadata
    ) -> None:
        """Take over what is new. Raises `TypeError` for a plan of another backend."""
        if not isinstance(meta, CpuMetadata):
            raise TypeError(f"a native layer was given {type(meta).__name__}, planned by another backend")
        cos, sin = (part.contiguous() for part in position_embeddings)
        arguments = self.arguments
        self.threads = torch.get_num_threads()
        self._kept = cos, sin  # what the arguments point to, beside the plan
        self._meta = ref(meta)  # weak: an engine that is closed lets go of its cache
        arguments.num_tokens, arguments.rotary_dim = num_tokens, cos.shape[-1]
        arguments.cos, arguments.sin = cos.data_ptr(), sin.data_ptr()
        arguments.slot_mapping = meta.batch.slot_mapping.data_ptr()
        arguments.attention = meta.planned.address
        arguments.workspace = self._workspace.at(layer, num_tokens, self.threads)


class _BoundLayer:
    """One layer: its arguments, which point to those of the step."""

    def __init__(self, parts: LayerParts, spec: ComputeSpec, step: _Step, chain: _Chain) -> None:
        self.parts = parts  # what the arguments point to, among others
        self.step = step
        self.arguments = _arguments(parts, spec)
        self.arguments.step = ctypes.addressof(step.arguments)
        sums = parts.group.shared_sums
        if sums is not None:
            self.arguments.group = ctypes.addressof(sums.group)
        self._cache: Callable[[], PagedKVCache | None] = _nothing
        self._chain = chain
        self._alone = _Run([self])

    def run(
        self, hidden_states: torch.Tensor, position_embeddings: PositionEmbeddings, attn_metadata: AttentionMetadata
    ) -> torch.Tensor:
        """`[1, num_tokens, hidden_size]` in and out."""
        meta, step = attn_metadata.of(self.parts.layer_idx), self.step
        if not step.is_of(meta):
            step.begin(self.arguments, hidden_states.shape[1], position_embeddings, meta)
        if self.parts.layer_idx > 0 and self._chain.is_result(hidden_states):
            return hidden_states
        run = self._chain.from_here(self) or self._alone
        out = run(hidden_states.contiguous(), step, attn_metadata)
        self._chain.passed(out, run)
        return out

    def point_to(self, cache: PagedKVCache) -> None:
        """Keep keys and values in this cache, whose tensors stay where they are."""
        if self._cache() is not cache:
            keys, values = cache.layer(self.parts.layer_idx)
            self.arguments.k_cache, self.arguments.v_cache = keys.data_ptr(), values.data_ptr()
            self._cache = ref(cache)


class _Run:
    """Layers of one step that follow one another, in one native call. Does not keep them alive."""

    def __init__(self, layers: list[_BoundLayer]) -> None:
        self._layers = [ref(layer) for layer in layers]
        self._group = layers[0].parts.group
        self._sums = self._group.shared_sums
        pointers = (ctypes.POINTER(DecoderLayerArgs) * len(layers))(
            *(ctypes.pointer(layer.arguments) for layer in layers)
        )
        self._arguments = DecoderLayersArgs(pointers, len(layers))
        self._entry = native().entry("decoder_layers", DecoderLayersArgs)

    @property
    def layers(self) -> list[_BoundLayer]:
        """Those that are still there, in order."""
        return [layer for each in self._layers if (layer := each()) is not None]

    def __call__(self, hidden_states: torch.Tensor, step: _Step, meta: AttentionMetadata) -> torch.Tensor:
        for layer in self.layers:
            layer.point_to(meta.kv_cache)
        out = torch.empty_like(hidden_states)
        step.arguments.hidden, step.arguments.out = hidden_states.data_ptr(), out.data_ptr()
        if self._sums is None:
            self._entry(self._arguments, step.threads)
            return out
        with self._group.summing(2 * len(self._layers)):
            if self._entry(self._arguments, step.threads):
                raise self._sums.failure()
        return out


class _Chain:
    """The layers of a model as far as they are bound; when all are, and share a step, they run in one call.

    The later layers then hand on what they are given: it is the result already. A layer that somebody watches by a hook
    runs by itself, and so do the others.
    """

    def __init__(self) -> None:
        self._layers: WeakValueDictionary[int, _BoundLayer] = WeakValueDictionary()
        self._all: _Run | None = None
        self._out: Callable[[], torch.Tensor | None] = _nothing

    def add(self, layer: _BoundLayer) -> None:
        """One more layer is bound."""
        self._layers[layer.parts.layer_idx] = layer
        layers = [self._layers[layer_idx] for layer_idx in sorted(self._layers)]
        is_whole = len(layers) == layer.parts.num_layers and len({id(each.step) for each in layers}) == 1
        self._all = _Run(layers) if is_whole else None

    def pop(self, layer_idx: int) -> None:
        """A layer is bound anew, or to something else."""
        self._layers.pop(layer_idx, None)
        self._all = None

    def from_here(self, layer: _BoundLayer) -> _Run | None:
        """All layers, where this is the first and nobody watches any."""
        if self._all is None or layer.parts.layer_idx != 0:
            return None
        return None if any(each.parts.is_watched() for each in self._all.layers) else self._all

    def passed(self, out: torch.Tensor, run: _Run) -> None:
        """What a call returned."""
        self._out = ref(out) if run is self._all else _nothing

    def is_result(self, hidden_states: torch.Tensor) -> bool:
        """Whether this is what all layers have made of the step."""
        return self._out() is hidden_states


def _nothing() -> None:
    return None


def _arguments(parts: LayerParts, spec: ComputeSpec) -> DecoderLayerArgs:
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


def _cache_strides(backend: AttentionBackend) -> tuple[int, ...]:
    """Of the keys of a layer by block, slot, head and element, in the layout that the backend works on."""
    spec, layout = backend.spec, backend.capabilities.kv_layout
    one_block = layout.arrange((1, spec.block_size, spec.num_kv_heads, spec.head_dim))
    return layout.as_nhd(torch.empty(one_block, device="meta")).stride()


def _linear(
    part: LinearPart, code: int, *, norm: NormPart | None = None, epilogue: int = 0, is_partial: bool = False
) -> LinearArgs:
    """The constant arguments of a projection. Of a sum over ranks, the first rank alone brings the bias."""
    if not isinstance(part.weight, PackedLinearWeight):
        raise TypeError(f"the native layer takes packed weights, not {type(part.weight).__name__}")
    packed = part.weight.packed
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
