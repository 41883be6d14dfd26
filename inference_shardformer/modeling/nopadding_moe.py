"""A mixture of experts over packed tokens: every rank holds a slice of every expert."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn import functional

from inference_shardformer.distributed.tensor_parallel import TensorParallelGroup


class NoPaddingMoE(nn.Module):
    """Routes each token to `top_k` experts and adds what they make of it, weighted by the router.

    Each expert's intermediate features are cut over the ranks, so that every rank reads the same share of the same
    weights whichever experts a step needs; whole experts on single ranks would leave most ranks idle in decoding. The
    router is whole on every rank: all choose alike. The partial sums of all experts are added over the ranks once.
    """

    def __init__(
        self,
        *,
        gate: nn.Module,
        experts: Mapping[int, nn.Module],
        top_k: int,
        normalises: bool,
        group: TensorParallelGroup,
    ) -> None:
        super().__init__()
        self.gate = gate
        self.experts = nn.ModuleList([experts[number] for number in range(len(experts))])
        self.top_k = top_k
        self.normalises = normalises
        self._group = group

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`[1, num_tokens, hidden_size]` in and out, equal on every rank."""
        return self._mix(hidden_states)[0]

    def extra_repr(self) -> str:
        """How many experts a token meets."""
        return f"experts={len(self.experts)}, top_k={self.top_k}"

    def _mix(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The output, and the router's logits `[num_tokens, num_experts]`."""
        tokens = hidden_states.view(-1, hidden_states.shape[-1])  # [num_tokens, hidden_size]
        logits = functional.linear(tokens, self.gate.get_parameter("weight"))
        weights, chosen = torch.topk(torch.softmax(logits.float(), dim=-1), self.top_k, dim=-1)  # [num_tokens, top_k]
        if self.normalises:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        weights = weights.to(tokens.dtype)
        out = torch.zeros_like(tokens)
        for number in torch.unique(chosen).tolist():
            rows, places = torch.where(chosen == number)
            out.index_add_(0, rows, self.experts[number](tokens[rows]) * weights[rows, places, None])
        return self._group.all_reduce(out).view_as(hidden_states), logits


class NoPaddingMoEWithLogits(NoPaddingMoE):
    """The same for decoder layers that expect the router's logits beside the output (transformers 4)."""

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        """The output `[1, num_tokens, hidden_size]`, and the router's logits `[num_tokens, num_experts]`."""
        return self._mix(hidden_states)
