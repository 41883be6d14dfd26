"""The contract of sampling kernels: they choose one token for each row of logits."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar, Protocol

import torch

from inference_shardformer.compute.base import ComputeKernel, ComputeKind

Greatest = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""Greatest value of each row of `[num_rows, size]` and its place, int64, the first among equals; NaN is greatest.

Both may be overwritten by the next call.
"""


class Draw(Protocol):
    """Draws tokens. The settings are those of the rows in order, and lie on the host."""

    def __call__(
        self,
        logits: torch.Tensor,
        *,
        temperatures: Sequence[float],
        top_ks: Sequence[int],
        top_ps: Sequence[float],
        uniforms: Sequence[float],
    ) -> torch.Tensor:
        """Token ids, int64 `[num_rows]`, of `logits` `[num_rows, vocab_size]`; waits for nothing.

        Scores are divided by the temperature, which is above 0; the `top_k` likeliest are kept (0: all), and those
        equal to the last of them, then the fewest whose probability reaches `top_p`, lower ids first among equals. The
        token is where the cumulative probability in order of ids first exceeds the row's number in [0, 1).
        """


class SamplingKernel(ComputeKernel):
    """Chooses by itself, or leaves it to the engine. A row's result depends on that row alone, on every rank alike."""

    kind: ClassVar[ComputeKind] = ComputeKind.SAMPLING

    @abstractmethod
    def bind(self) -> Draw | None:
        """What draws; `None` leaves it to the engine, which sorts with torch."""

    def bind_greatest(self) -> Greatest | None:
        """What finds the likeliest tokens; `None` leaves it to the engine, too."""
        return None
