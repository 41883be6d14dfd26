"""The MLP of two projections, without a gate."""

from __future__ import annotations

import torch
from torch import nn


class NoPaddingMLP(nn.Module):
    """Widens, activates, and narrows again; the wide features are cut over ranks."""

    def __init__(self, *, up_proj: nn.Module, down_proj: nn.Module, act_fn: nn.Module) -> None:
        super().__init__()
        self.up_proj = up_proj
        self.down_proj = down_proj
        self.act_fn = act_fn

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`[..., hidden_size]` in and out, equal on every rank."""
        return self.down_proj(self.act_fn(self.up_proj(hidden_states)))
