"""CheckedBackend: refuses what a policy hands to attention in wrong shapes, before a kernel reads beyond a tensor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from inference_shardformer.attention.base import AttentionBackend, AttentionMetadata, RaggedBatch
from inference_shardformer.errors import PolicyError
from inference_shardformer.kv_cache.cache import LayerKVCache, PagedKVCache


class CheckedBackend(AttentionBackend):
    """A backend whose arguments are compared with its spec."""

    def __init__(self, inner: AttentionBackend) -> None:
        super().__init__(inner.spec, inner.options)
        self.inner = inner
        self.name = inner.name  # type: ignore[misc]
        self.capabilities = inner.capabilities  # type: ignore[misc]

    def plan(self, batch: RaggedBatch, kv_cache: PagedKVCache) -> AttentionMetadata:
        """As the backend."""
        return self.inner.plan(batch, kv_cache)

    def write(self, k: torch.Tensor, v: torch.Tensor, cache: LayerKVCache, meta: AttentionMetadata) -> None:
        """As the backend. Raises `PolicyError` for a wrong number of key/value heads or elements."""
        for name, given in (("keys", k), ("values", v)):
            self._check(name, given, self.spec.num_kv_heads, meta)
        self.inner.write(k, v, cache, meta)

    def attend(self, q: torch.Tensor, cache: LayerKVCache, meta: AttentionMetadata) -> torch.Tensor:
        """As the backend. Raises `PolicyError` for a wrong number of heads or elements."""
        self._check("queries", q, self.spec.num_heads, meta)
        return self.inner.attend(q, cache, meta)

    def attend_with_sinks(
        self, q: torch.Tensor, cache: LayerKVCache, meta: AttentionMetadata, sinks: torch.Tensor
    ) -> torch.Tensor:
        """As the backend. Raises `PolicyError` for a wrong number of heads or elements."""
        self._check("queries", q, self.spec.num_heads, meta)
        return self.inner.attend_with_sinks(q, cache, meta, sinks)

    def _check(self, name: str, given: torch.Tensor, num_heads: int, meta: AttentionMetadata) -> None:
        expected = (meta.batch.num_tokens, num_heads, self.spec.head_dim)
        if tuple(given.shape) != expected:
            raise PolicyError(
                f"attention was handed {name} of shape {list(given.shape)}, and this rank's share is {list(expected)}",
                remedy="let the module split its projection by the head counts of its backend's spec",
            )


@contextmanager
def checked_backends(model: nn.Module) -> Iterator[None]:
    """Check what the attention modules of a sharded model hand to their backends."""
    places = [
        (module, name, held)
        for module in model.modules()
        for name, held in vars(module).items()
        if isinstance(held, AttentionBackend)
    ]
    for module, name, held in places:
        setattr(module, name, CheckedBackend(held))
    try:
        yield
    finally:
        for module, name, held in places:
            setattr(module, name, held)
