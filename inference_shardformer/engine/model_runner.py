"""ModelRunner: one forward pass over one batch."""

from __future__ import annotations

from typing import Protocol

import torch

from inference_shardformer.attention.base import AttentionBackend, AttentionMetadata
from inference_shardformer.engine.batch import ForwardBatch
from inference_shardformer.kv_cache.cache import PagedKVCache


class CausalOutput(Protocol):
    """What a causal language model returns."""

    logits: torch.Tensor  # [1, num_logits, local_vocab]


class CausalModel(Protocol):
    """A sharded Hugging Face causal language model whose attention reads `attn_metadata`."""

    def __call__(
        self,
        *,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        use_cache: bool,
        attn_metadata: AttentionMetadata,
        logits_to_keep: torch.Tensor,
    ) -> CausalOutput:
        """Logits after the packed tokens that `logits_to_keep` names."""


class ModelRunner:
    """Plans the attention of a step and runs the model on it."""

    def __init__(self, model: CausalModel, *, backend: AttentionBackend, kv_cache: PagedKVCache) -> None:
        self._model = model
        self.backend = backend
        self.kv_cache = kv_cache

    def bind(self, backend: AttentionBackend, kv_cache: PagedKVCache) -> None:
        """Plan with this backend, over this cache, from the next step on. The model is bound by who built it."""
        self.backend, self.kv_cache = backend, kv_cache

    @torch.inference_mode()
    def run(self, batch: ForwardBatch) -> torch.Tensor:
        """This rank's logits, float32 `[num_logits, local_vocab]`; keys and values are written to the cache."""
        output = self._model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            use_cache=False,
            attn_metadata=self.backend.plan(batch.ragged, self.kv_cache),
            logits_to_keep=batch.logits_indices,
        )
        return output.logits[0].float()
