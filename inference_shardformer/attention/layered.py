"""LayeredAttention: the backends of all layers of one model on one rank, and the plan of a step for each of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from inference_shardformer.attention.base import AttentionBackend, AttentionMetadata, RaggedBatch
from inference_shardformer.attention.groups import LayerGroups
from inference_shardformer.kv_cache.cache import PagedKVCache
from inference_shardformer.kv_cache.layout import KVLayout


@dataclass(frozen=True)
class LayeredMetadata(AttentionMetadata):
    """The plans of several backends; every layer takes that of its own."""

    plans: Sequence[AttentionMetadata]  # one for each group of layers
    group_of: Sequence[int]  # [num_layers], a place in `plans`

    def of(self, layer_idx: int) -> AttentionMetadata:
        """What the backend of one layer planned."""
        return self.plans[self.group_of[layer_idx]]


@dataclass(frozen=True)
class LayeredAttention:
    """One backend for each group of layers. Every one of them works on the same batch and the same cache."""

    groups: LayerGroups
    backends: tuple[AttentionBackend, ...]

    def of(self, layer_idx: int) -> AttentionBackend:
        """The backend of one layer, which its module binds."""
        return self.backends[self.groups.group_of[layer_idx]]

    def plan(self, batch: RaggedBatch, kv_cache: PagedKVCache) -> AttentionMetadata:
        """Let every backend prepare one step, once."""
        plans = [backend.plan(batch, kv_cache) for backend in self.backends]
        return plans[0] if len(plans) == 1 else LayeredMetadata(batch, kv_cache, plans, self.groups.group_of)

    @property
    def can_capture(self) -> bool:
        """Whether every backend has plans that can be captured."""
        return all(backend.can_capture for backend in self.backends)

    def plan_capture(self, num_decodes: int, kv_cache: PagedKVCache) -> AttentionMetadata:
        """Let every backend prepare a decode step that is recorded; one batch for each, refilled by `replan`."""
        plans = [backend.plan_capture(num_decodes, kv_cache) for backend in self.backends]
        if len(plans) == 1:
            return plans[0]
        return LayeredMetadata(plans[0].batch, kv_cache, plans, self.groups.group_of)

    def replan(self, batch: RaggedBatch, meta: AttentionMetadata) -> None:
        """Let every backend refill what it prepared."""
        plans = meta.plans if isinstance(meta, LayeredMetadata) else (meta,)
        for backend, plan in zip(self.backends, plans, strict=True):
            backend.replan(batch, plan)

    @property
    def kv_layouts(self) -> tuple[KVLayout, ...]:
        """The layout of the cache that each layer's backend works on, `[num_layers]`."""
        return tuple(self.backends[group].capabilities.kv_layout for group in self.groups.group_of)

    @property
    def names(self) -> tuple[str, ...]:
        """The backends that serve, each once."""
        return tuple(dict.fromkeys(backend.name for backend in self.backends))
