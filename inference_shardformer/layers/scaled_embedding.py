"""Vocabulary-parallel embedding whose rows are scaled, as in Gemma."""

from __future__ import annotations

import torch

from inference_shardformer.compute.linear import LinearWeight
from inference_shardformer.distributed.tensor_parallel import TensorParallelGroup
from inference_shardformer.layers.embedding import VocabParallelEmbedding


class ScaledVocabParallelEmbedding(VocabParallelEmbedding):
    """Multiplies every row by `scale`, rounded to the type of the weight first, as Hugging Face does."""

    def __init__(
        self, weight: LinearWeight, *, vocab_range: tuple[int, int], group: TensorParallelGroup, scale: float
    ) -> None:
        super().__init__(weight, vocab_range=vocab_range, group=group)
        self.scale = torch.tensor(scale).to(weight.shape.dtype).item()

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Token ids `[...]` to `[..., hidden_size]`, equal on every rank."""
        return super().forward(input_ids) * self.scale

    def extra_repr(self) -> str:
        """As for the embedding, and the scale."""
        return f"{super().extra_repr()}, scale={self.scale}"
