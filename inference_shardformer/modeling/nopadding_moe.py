"""A mixture of experts over packed tokens: every rank holds a slice of every expert."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn import functional

from inference_shardformer.compute.experts import ExpertParts, ExpertsKernel, Mix
from inference_shardformer.distributed.tensor_parallel import TensorParallelGroup
from inference_shardformer.layers.linear import ParallelLinear
from inference_shardformer.modeling.nopadding_llama import NoPaddingLlamaMLP


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
        kernel: ExpertsKernel | None = None,
    ) -> None:
        super().__init__()
        self.gate = gate
        self.experts = nn.ModuleList([experts[number] for number in range(len(experts))])
        self.top_k = top_k
        self.normalises = normalises
        self._group = group
        self._kernel = kernel
        self._run: Mix = self.run_modules

    def weights_loaded(self) -> None:
        """Bind what runs the experts; their parameters keep their addresses from now on."""
        parts = None if self._kernel is None else self._parts()
        self._run = (self._kernel.bind(parts) if self._kernel and parts else None) or self.run_modules

    def run_modules(self, tokens: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """The experts that are met, one after the other; see `Mix`."""
        out = torch.zeros_like(tokens)
        for number in torch.unique(chosen).tolist():
            rows, places = torch.where(chosen == number)
            out.index_add_(0, rows, self.experts[number](tokens[rows]) * weights[rows, places, None])
        return out

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
        out = self._run(tokens, weights.to(tokens.dtype), chosen)
        return self._group.all_reduce(out).view_as(hidden_states), logits

    def _parts(self) -> ExpertParts | None:
        """The experts for a kernel; `None` where they are not all of the usual form, without biases."""
        experts = [each for each in self.experts if isinstance(each, NoPaddingLlamaMLP)]
        layers = [(each.gate_up_proj, each.down_proj) for each in experts]
        held = [each for pair in layers for each in pair if isinstance(each, ParallelLinear) and each.bias is None]
        if len(held) < 2 * len(self.experts):
            return None
        return ExpertParts([each.stored for each in held[::2]], [each.stored for each in held[1::2]], experts[0].act_fn)


class NoPaddingMoEWithLogits(NoPaddingMoE):
    """The same for decoder layers that expect the router's logits beside the output (transformers 4)."""

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        """The output `[1, num_tokens, hidden_size]`, and the router's logits `[num_tokens, num_experts]`."""
        return self._mix(hidden_states)
