"""The contract of rotary kernels: they give queries and keys their positions, and put keys and values in the cache."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch

from inference_shardformer.attention.base import AttentionBackend, AttentionMetadata, KVLayout, Reason
from inference_shardformer.attention.slot_writes import is_stored_by_slot
from inference_shardformer.compute.base import ComputeKernel, ComputeKind, ComputeSpec
from inference_shardformer.kv_cache.cache import LayerKVCache

_LOG = logging.getLogger(__name__)

RotaryWrite = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, LayerKVCache, AttentionMetadata], torch.Tensor]
"""Heads `[num_tokens, num_heads + 2 * num_kv_heads, head_dim]`, queries first, cos and sin `[num_tokens, rotary_dim]`,
the cache and the plan of the layer, to turned queries `[num_tokens, num_heads, head_dim]`."""


class RotaryWriteKernel(ComputeKernel):
    """Turns queries and keys and stores keys and values, or leaves that to torch and the attention backend."""

    kind: ClassVar[ComputeKind] = ComputeKind.ROTARY_WRITE

    @abstractmethod
    def bind(self, backend: AttentionBackend) -> RotaryWrite | None:
        """What the layers of one backend call; `None`: torch turns them, and the backend's own `write` stores them.

        Called anew when a layer's backend is exchanged.
        """


class FusedRotaryWrite(RotaryWriteKernel):
    """Does both in one go, for every attention backend whose `write` only stores by slot.

    `cache_dtypes` are those that it can store in, beside the type it computes in.
    """

    cache_dtypes: ClassVar[tuple[torch.dtype, ...]] = ()

    @classmethod
    def extra_reasons(cls, spec: ComputeSpec) -> list[Reason]:
        """Attention of another kind, and backends that store in a way of their own."""
        found = []
        if spec.rotary != "halves":
            message = "the policy names no attention that turns the halves of its heads"
            found.append(Reason("rotary", message, "nothing is wrong: its modules place queries and keys themselves"))
        if spec.kv_dtype not in (None, spec.dtype, *cls.cache_dtypes):
            message = f"{cls.name} does not store keys and values in {str(spec.kv_dtype).removeprefix('torch.')}"
            found.append(Reason("kv_dtype", message, "nothing is wrong: the attention backend stores them itself"))
        if spec.own_writes:
            message = f"attention backend {', '.join(spec.own_writes)} writes to the cache in a way of its own"
            found.append(Reason("own_write", message, "choose another attention.backend, or mark its write"))
        return found

    def bind(self, backend: AttentionBackend) -> RotaryWrite | None:
        """One call; `None` for a backend that writes in a way of its own, or stores in a type that is not known."""
        own, layout = backend.spec, backend.capabilities.kv_layout
        if not is_stored_by_slot(backend) or own.cache_dtype not in (own.dtype, *self.cache_dtypes):
            _LOG.info(
                "attention backend %s stores keys and values itself, not rotary kernel %s", backend.name, self.name
            )
            return None

        def run(
            heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, cache: LayerKVCache, meta: AttentionMetadata
        ) -> torch.Tensor:
            return self.rotate_and_write(heads, cache, meta.batch.slot_mapping, cos=cos, sin=sin, layout=layout)

        return run

    @abstractmethod
    def rotate_and_write(
        self,
        heads: torch.Tensor,
        cache: LayerKVCache,
        slot_mapping: torch.Tensor,
        *,
        cos: torch.Tensor,
        sin: torch.Tensor,
        layout: KVLayout,
    ) -> torch.Tensor:
        """Turn the first `rotary_dim` elements of queries and keys, store keys and values, and return the queries.

        `heads` is `[num_tokens, num_heads + 2 * num_kv_heads, head_dim]`; element `i` pairs with `i + rotary_dim / 2`;
        `cos` and `sin` are `[num_tokens, rotary_dim]`, both halves alike; `slot_mapping` is int64 `[num_tokens]`.
        """
