"""Plain-torch twin of the mixture of experts, one token and one expert after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch


def mix(
    tokens: torch.Tensor,  # [num_tokens, hidden_size]
    weights: torch.Tensor,  # [num_tokens, top_k], how much of each choice
    chosen: torch.Tensor,  # [num_tokens, top_k], the experts
    *,
    gate_up: Sequence[torch.Tensor],  # of each expert, [2 * size, hidden_size], gate first
    down: Sequence[torch.Tensor],  # of each expert, [hidden_size, size]
    act: Callable[[torch.Tensor], torch.Tensor] = torch.nn.functional.silu,
) -> torch.Tensor:
    """`sum of weight * down(act(gate) * up)` over the experts of each token, in float64."""
    out = torch.zeros(tokens.shape, dtype=torch.float64, device=tokens.device)
    for token, experts in enumerate(chosen.tolist()):
        x = tokens[token].double()
        for place, expert in enumerate(experts):
            gate, up = (gate_up[expert].double() @ x).chunk(2)
            out[token] += weights[token, place].double() * (down[expert].double() @ (act(gate) * up))
    return out
