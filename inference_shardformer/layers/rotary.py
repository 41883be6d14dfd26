"""Rotary embeddings over packed tokens, with Hugging Face's own frequencies."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

FrequenciesOfLength = Callable[[int], torch.Tensor]

_FIRST_POSITIONS = 1024


class RotaryEmbedding(nn.Module):
    """cos and sin of each packed token; the call contract of Hugging Face's rotary modules.

    `inv_freq [head_dim / 2]` and `scaling` come from Hugging Face's initialisation of the model's rope type.
    """

    inv_freq: torch.Tensor

    def __init__(self, inv_freq: torch.Tensor, scaling: float) -> None:
        super().__init__()
        self.register_buffer("inv_freq", inv_freq.float(), persistent=False)
        self.scaling = scaling

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions `[1, num_tokens]` to cos and sin `[1, num_tokens, head_dim]` in the type of `x`."""
        return self._angles(x, position_ids[:1], self.inv_freq)

    def _angles(
        self, x: torch.Tensor, positions: torch.Tensor, inv_freq: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        freqs = positions[..., None].float() * inv_freq
        angles = torch.cat((freqs, freqs), dim=-1)
        return (angles.cos() * self.scaling).to(x.dtype), (angles.sin() * self.scaling).to(x.dtype)


class LengthDependentRotaryEmbedding(RotaryEmbedding):
    """Rope types whose frequencies depend on the length of the sequence (dynamic NTK, longrope).

    Frequencies are chosen for each token by its own sequence, so that a request does not depend on its company. The
    length arrives as a second row of `position_ids`: the prompt's length for prompt tokens, and position + 1 for
    generated ones, which is what Hugging Face's `generate` uses when it meets the token for the first time.
    """

    def __init__(self, frequencies: FrequenciesOfLength, base: torch.Tensor, scaling: float) -> None:
        super().__init__(base, scaling)
        self._frequencies = frequencies

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`[2, num_tokens]` (positions; sequence lengths) to cos and sin `[1, num_tokens, head_dim]`."""
        lengths, index = torch.unique(position_ids[1], return_inverse=True)
        table = torch.stack([self._frequencies(length) for length in lengths.tolist()])
        return self._angles(x, position_ids[:1], table.to(x.device)[index])


class TabledRotaryEmbedding(RotaryEmbedding):
    """The same for a device: every length up to `longest` has been looked up before, so that a step waits for nothing.

    Lengths with equal frequencies share a row. Frequencies change with the length in one direction, as those of both
    rope types do, so that what is equal at two lengths is equal between them.
    """

    rows: torch.Tensor
    row_of_length: torch.Tensor

    def __init__(self, frequencies: FrequenciesOfLength, base: torch.Tensor, scaling: float, *, longest: int) -> None:
        super().__init__(base, scaling)
        rows = _differing(frequencies, 1, longest)
        is_start = torch.zeros(longest + 1, dtype=torch.int64)
        is_start[[length for length in rows if length > 1]] = 1
        table = torch.stack([rows[length].float() for length in sorted(rows)])
        self.register_buffer("rows", table, persistent=False)  # [num_rows, head_dim / 2]
        self.register_buffer("row_of_length", is_start.cumsum(0), persistent=False)  # [longest + 1]

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`[2, num_tokens]` (positions; sequence lengths) to cos and sin `[1, num_tokens, head_dim]`."""
        return self._angles(x, position_ids[:1], self.rows[self.row_of_length[position_ids[1]]])


class RotaryTable:
    """cos and sin of the positions met so far, by a model's own rotary module; each position is computed once.

    For rotary modules that see nothing but positions.
    """

    def __init__(self, rotary: nn.Module, dtype: torch.dtype) -> None:
        self._rotary = rotary
        self._like = torch.empty(0, dtype=dtype)
        self._angles = self._like, self._like
        self._num_positions = 0

    def upto(self, num_positions: int) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin, each `[at least num_positions, rotary_dim]`."""
        if self._num_positions < num_positions:
            size = max(_FIRST_POSITIONS, 1 << (num_positions - 1).bit_length())
            cos, sin = self._rotary(self._like, torch.arange(size).unsqueeze(0))
            self._angles, self._num_positions = (cos[0].contiguous(), sin[0].contiguous()), size
        return self._angles


def _differing(frequencies: FrequenciesOfLength, first: int, last: int) -> dict[int, torch.Tensor]:
    """Frequencies by the first length that has them, from `first` to `last`.

    Looks at the ends of a range and, while they differ, at those of its halves.
    """
    found, ranges = {first: frequencies(first)}, [(first, last)]
    while ranges:
        low, high = ranges.pop()
        of_high = frequencies(high)
        if torch.equal(frequencies(low), of_high):
            continue
        if high - low == 1:
            found[high] = of_high
            continue
        middle = (low + high) // 2
        ranges += [(middle, high), (low, middle)]
    return found


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate `x [num_tokens, heads, head_dim]` by cos and sin `[num_tokens, 1, head_dim]`, halves split as in LLaMA."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
