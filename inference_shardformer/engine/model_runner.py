"""ModelRunner: one forward pass over one batch."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from inference_shardformer.attention.base import AttentionMetadata, RaggedBatch
from inference_shardformer.engine.batch import ForwardBatch
from inference_shardformer.engine.graphs import DecodeGraphs
from inference_shardformer.kv_cache.cache import PagedKVCache

Found = tuple[torch.Tensor, torch.Tensor]  # float32 and int64, each [num_logits]


class CausalOutput(Protocol):
    """What a causal language model returns."""

    @property
    def logits(self) -> torch.Tensor:
        """Float32 `[num_logits, local_vocab]`."""

    @property
    def greatest(self) -> Found | None:
        """Value and place of each row's greatest logit, where the model found them in passing."""


class CausalModel(Protocol):
    """A sharded causal language model whose attention reads `attn_metadata`; takes care of torch's inference mode."""

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


class AttentionPlanner(Protocol):
    """What prepares the attention of a step: the backends of all layers, or one backend."""

    @property
    def can_capture(self) -> bool:
        """Whether decode steps can be planned once and recorded; asked only where graphs are wanted."""

    def plan(self, batch: RaggedBatch, kv_cache: PagedKVCache) -> AttentionMetadata:
        """Prepare one step; layer `i` takes `of(i)` of the result."""

    def plan_capture(self, num_decodes: int, kv_cache: PagedKVCache) -> AttentionMetadata:
        """Prepare a step of decodes that is recorded."""

    def replan(self, batch: RaggedBatch, meta: AttentionMetadata) -> None:
        """Refill what `plan_capture` prepared."""


class ModelRunner:
    """Plans the attention of a step and runs the model on it."""

    def __init__(
        self,
        model: CausalModel,
        *,
        attention: AttentionPlanner,
        kv_cache: PagedKVCache,
        graphs: DecodeGraphs | None = None,
    ) -> None:
        """`graphs` replay decode steps; their backends then plan for them, too."""
        self._model = model
        self.attention = attention
        self.kv_cache = kv_cache
        self.graphs = graphs

    def bind(self, attention: AttentionPlanner, kv_cache: PagedKVCache) -> None:
        """Plan with these backends, over this cache, from the next step on. The model is bound by who built it."""
        self.attention, self.kv_cache = attention, kv_cache
        if self.graphs is not None:
            self.graphs.rebind(can_capture=attention.can_capture)

    def num_padding(self, num_decodes: int, num_seqs: int) -> int:
        """How many copies of its last sequence a batch should get."""
        return 0 if self.graphs is None else self.graphs.num_padding(num_decodes, num_seqs)

    def run(self, batch: ForwardBatch) -> tuple[torch.Tensor, Found | None]:
        """This rank's logits, float32 `[num_logits, local_vocab]`, and the greatest of each row if they are known.

        Keys and values are written to the cache. What is returned is overwritten by the next step.
        """
        if self.graphs is not None and self.graphs.serves(batch):
            return self._replayed(self.graphs, batch), None
        meta = self.attention.plan(batch.ragged, self.kv_cache)
        output = self._forward(batch.input_ids, batch.position_ids, meta, batch.logits_indices)
        return output.logits, output.greatest

    @torch.inference_mode()
    def _replayed(self, graphs: DecodeGraphs, batch: ForwardBatch) -> torch.Tensor:
        def forward(*inputs: Any) -> torch.Tensor:
            return self._forward(*inputs).logits

        logits = graphs.run(batch, forward, self.attention, self.kv_cache)
        return logits[: batch.num_rows]

    def _forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        meta: AttentionMetadata,
        logits_indices: torch.Tensor,
    ) -> CausalOutput:
        return self._model(
            input_ids=input_ids,
            position_ids=position_ids,
            use_cache=False,
            attn_metadata=meta,
            logits_to_keep=logits_indices,
        )
