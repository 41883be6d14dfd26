"""Vocabulary-parallel embedding and output head: each rank holds a range of token ids, padded to equal parts."""

from __future__ import annotations

import torch

from inference_shardformer.compute.linear import LinearWeight
from inference_shardformer.distributed.tensor_parallel import TensorParallelGroup
from inference_shardformer.layers.linear import ColumnParallelLinear, WeightHolder


class VocabParallelEmbedding(WeightHolder):
    """Rows `[start, stop)` of the embedding; rows behind them are padding that no token id reaches."""

    def __init__(self, weight: LinearWeight, *, vocab_range: tuple[int, int], group: TensorParallelGroup) -> None:
        super().__init__(weight)
        self.start, self.stop = vocab_range
        self._group = group

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Token ids `[...]` to `[..., hidden_size]`, equal on every rank; other ranks' tokens count as zero here."""
        if self._group.size == 1:
            return self.stored.rows(input_ids)
        local = input_ids - self.start
        elsewhere = (local < 0) | (local >= self.stop - self.start)
        rows = self.stored.rows(local.masked_fill(elsewhere, 0))
        return self._group.all_reduce(rows.masked_fill(elsewhere.unsqueeze(-1), 0))

    def extra_repr(self) -> str:
        """Rows held here and the token ids they belong to."""
        return f"rows={self.stored.shape.out_features}, vocab=[{self.start}, {self.stop})"


class ParallelLMHead(ColumnParallelLinear):
    """Logits of this rank's part of the vocabulary, padding columns included; the sampler combines the ranks."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., hidden_size]` to float32 `[..., vocabulary on this rank]`."""
        return self.stored.multiply_wide(x, self.bias)
