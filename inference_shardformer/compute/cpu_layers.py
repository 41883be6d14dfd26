"""Decoder layers bound to the native kernel: the arguments of each, and the calls that run one or all of them."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from weakref import WeakValueDictionary, ref

import torch

from inference_shardformer.attention.base import AttentionMetadata
from inference_shardformer.attention.cpu import CpuMetadata
from inference_shardformer.compute.base import ComputeSpec
from inference_shardformer.compute.cpu_arguments import layer_arguments
from inference_shardformer.compute.decoder_layer import Angles, LayerParts, PositionEmbeddings
from inference_shardformer.kernels.cpu.decoder_layer import (
    DecoderLayerArgs,
    DecoderLayersArgs,
    LayerStep,
    LayerWorkspace,
    ModelEndsArgs,
)
from inference_shardformer.kernels.cpu.library import native
from inference_shardformer.kernels.cpu.linear_arguments import LinearArgs
from inference_shardformer.kv_cache.cache import PagedKVCache


class SharedStep:
    """What the layers of one attention backend share in a step; filled by the first of them."""

    def __init__(self, workspace: LayerWorkspace) -> None:
        self._workspace = workspace
        self._meta: Callable[[], AttentionMetadata | None] = _nothing
        self._kept: Angles | None = None
        self.arguments = LayerStep()
        self.threads = 1
        self.cache: Callable[[], PagedKVCache | None] = _nothing
        self.num_caches = 0  # that followed one another

    def is_of(self, meta: AttentionMetadata) -> bool:
        """Whether this is the step that `meta` was planned for."""
        return self._meta() is meta

    def begin(
        self,
        layer: DecoderLayerArgs,
        num_tokens: int,
        angles: Angles,
        meta: AttentionMetadata,
        head: LinearArgs | None = None,
    ) -> None:
        """Take over what is new. Raises `TypeError` for a plan of another backend."""
        if not isinstance(meta, CpuMetadata):
            raise TypeError(f"a native layer was given {type(meta).__name__}, planned by another backend")
        arguments = self.arguments
        cos, sin, positions = self._kept = angles  # what the arguments point to, beside the plan
        self.threads = torch.get_num_threads()
        self._meta = ref(meta)  # weak: an engine that is closed lets go of its cache
        arguments.num_tokens, arguments.rotary_dim = num_tokens, cos.shape[-1]
        arguments.cos, arguments.sin = cos.data_ptr(), sin.data_ptr()
        arguments.positions = None if positions is None else positions.data_ptr()
        arguments.slot_mapping = meta.batch.slot_mapping.data_ptr()
        arguments.attention = meta.planned.address
        arguments.workspace = self._workspace.at(layer, num_tokens, self.threads, head)
        if self.cache() is not meta.kv_cache:
            self.cache = ref(meta.kv_cache)
            self.num_caches += 1


class BoundLayer:
    """One layer: its arguments, which point to those of the step."""

    def __init__(self, parts: LayerParts, spec: ComputeSpec, step: SharedStep, chain: LayerChain) -> None:
        self.parts = parts  # what the arguments point to, among others
        self.step = step
        self.arguments = layer_arguments(parts, spec)
        self.arguments.step = ctypes.addressof(step.arguments)
        sums = parts.group.shared_sums
        if sums is not None:
            self.arguments.group = ctypes.addressof(sums.group)
        self._chain = chain
        self._alone = LayerRun([self])

    def run(
        self, hidden_states: torch.Tensor, position_embeddings: PositionEmbeddings, attn_metadata: AttentionMetadata
    ) -> torch.Tensor:
        """`[1, num_tokens, hidden_size]` in and out."""
        meta, step = attn_metadata.of(self.parts.layer_idx), self.step
        if not step.is_of(meta):
            cos, sin = (part.contiguous() for part in position_embeddings)
            step.begin(self.arguments, hidden_states.shape[1], Angles(cos, sin, None), meta)
        if self.parts.layer_idx > 0 and self._chain.is_result(hidden_states):
            return hidden_states
        run = self._chain.from_here(self) or self._alone
        hidden_states = hidden_states.contiguous()
        out = torch.empty_like(hidden_states)
        step.arguments.hidden, step.arguments.out = hidden_states.data_ptr(), out.data_ptr()
        run()
        self._chain.passed(out, run)
        return out

    def point_to(self, cache: PagedKVCache) -> None:
        """Keep keys and values in this cache, whose tensors stay where they are."""
        keys, values = cache.layer(self.parts.layer_idx)
        self.arguments.k_cache, self.arguments.v_cache = keys.data_ptr(), values.data_ptr()


class LayerRun:
    """Layers of one step that follow one another, in one native call. Does not keep them alive."""

    def __init__(self, layers: list[BoundLayer]) -> None:
        self.step = layers[0].step
        self.first = layers[0].arguments
        self._num_layers = len(layers)
        self._bound = [ref(layer) for layer in layers]
        self._cache_number = 0  # of the cache that the layers are pointed to
        self._hooks = tuple(each for layer in layers for each in layer.parts.hooks)
        self._group = layers[0].parts.group
        self._sums = self._group.shared_sums
        self._layers = (ctypes.POINTER(DecoderLayerArgs) * len(layers))(
            *(ctypes.pointer(layer.arguments) for layer in layers)
        )
        self._arguments = self.with_ends(None)
        self._entry = native().entry("decoder_layers", DecoderLayersArgs)

    @property
    def is_watched(self) -> bool:
        """Whether somebody's hooks want to see what goes in and out of one of the layers."""
        return any(self._hooks)

    def with_ends(self, ends: ModelEndsArgs | None) -> DecoderLayersArgs:
        """The arguments of a call that runs the layers, and the ends of their model where they are given."""
        arguments = DecoderLayersArgs(self._layers, self._num_layers, ends is not None)
        if ends is not None:
            arguments.ends = ends
        return arguments

    def __call__(self, arguments: DecoderLayersArgs | None = None) -> None:
        """Run what the step holds by now; with the arguments of `with_ends`, the ends of the model, too."""
        call = self._arguments if arguments is None else arguments
        if self._cache_number != self.step.num_caches:
            self._point_to_cache()
        if self._sums is None:
            self._entry(call, self.step.threads)
            return
        with self._group.summing(2 * self._num_layers + call.has_ends):
            if self._entry(call, self.step.threads):
                raise self._sums.failure()

    def _point_to_cache(self) -> None:
        cache, self._cache_number = self.step.cache(), self.step.num_caches
        for each in self._bound:
            if cache is not None and (layer := each()) is not None:
                layer.point_to(cache)


class LayerChain:
    """The layers of a model as far as they are bound; when all are, and share a step, they run in one call.

    The later layers then hand on what they are given: it is the result already. A layer that somebody watches by a hook
    runs by itself, and so do the others.
    """

    def __init__(self) -> None:
        self._layers: WeakValueDictionary[int, BoundLayer] = WeakValueDictionary()
        self._all: LayerRun | None = None
        self._out: Callable[[], torch.Tensor | None] = _nothing

    def add(self, layer: BoundLayer) -> None:
        """One more layer is bound."""
        self._layers[layer.parts.layer_idx] = layer
        layers = [self._layers[layer_idx] for layer_idx in sorted(self._layers)]
        is_whole = len(layers) == layer.parts.num_layers and len({id(each.step) for each in layers}) == 1
        self._all = LayerRun(layers) if is_whole else None

    def pop(self, layer_idx: int) -> None:
        """A layer is bound anew, or to something else."""
        self._layers.pop(layer_idx, None)
        self._all = None

    def whole(self) -> LayerRun | None:
        """All layers in one call, where all are bound alike and nobody watches any."""
        return None if self._all is None or self._all.is_watched else self._all

    def from_here(self, layer: BoundLayer) -> LayerRun | None:
        """All layers, where this is the first."""
        return self.whole() if layer.parts.layer_idx == 0 else None

    def passed(self, out: torch.Tensor, run: LayerRun) -> None:
        """What a call returned."""
        self._out = ref(out) if run is self._all else _nothing

    def is_result(self, hidden_states: torch.Tensor) -> bool:
        """Whether this is what all layers have made of the step."""
        return self._out() is hidden_states


def _nothing() -> None:
    return None
