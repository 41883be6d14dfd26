"""Vocabulary-parallel embedding and output head: each rank holds a range of token ids, padded to equal parts."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from inference_shardformer.distributed.tensor_parallel import TensorParallelGroup
from inference_shardformer.layers.linear import ColumnParallelLinear


class VocabParallelEmbedding(nn.Module):
    """Rows `[start, stop)` of the embedding; rows behind them are padding that no token id reaches."""

    def __init__(
        self, num_rows: int, hidden_size: int, *, vocab_range: tuple[int, int], group: TensorParallelGroup
    ) -> None:
        super().__init__()
        self.start, self.stop = vocab_range
        self.weight = nn.Parameter(torch.empty(num_rows, hidden_size, device="meta"), requires_grad=False)
        self._group = group

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Token ids `[...]` to `[..., hidden_size]`, equal on every rank; other ranks' tokens count as zero here."""
        if self._group.size == 1:
            return functional.embedding(input_ids, self.weight)
        local = input_ids - self.start
        elsewhere = (local < 0) | (local >= self.stop - self.start)
        rows = functional.embedding(local.masked_fill(elsewhere, 0), self.weight)
        return self._group.all_reduce(rows.masked_fill(elsewhere.unsqueeze(-1), 0))

    def extra_repr(self) -> str:
        """Rows held here and the token ids they belong to."""
        return f"rows={self.weight.shape[0]}, vocab=[{self.start}, {self.stop})"


class ParallelLMHead(ColumnParallelLinear):
    """Logits of this rank's part of the vocabulary, padding columns included; the sampler combines the ranks."""
