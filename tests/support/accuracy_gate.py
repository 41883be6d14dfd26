"""What rounding may cost, on held-out text of the trained demo model: perplexity, and logits beside those of fp32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scoring import perplexity, relative_error

LARGEST_BF16_ERROR = 0.01
NUM_SEQUENCES, NUM_TOKENS = 6, 400


@dataclass(frozen=True)
class Gate:
    """The bounds: of the perplexity, times that of fp32; of the logits' error, in units of their spread."""

    perplexity_ratio: float
    logit_error: float

    def check(
        self, kept: torch.Tensor, rounded: torch.Tensor, expected: torch.Tensor, sequences: Sequence[list[int]]
    ) -> None:
        """Logits of the engine without rounding and with it, beside those of the unsharded model in fp32."""
        assert relative_error(kept, expected) <= LARGEST_BF16_ERROR
        assert relative_error(kept, expected) < relative_error(rounded, expected) <= self.logit_error
        best = perplexity(expected, sequences)
        assert best < 12.0  # a uniform guess is 2048: the model knows the text
        for logits in (kept, rounded):
            assert perplexity(logits, sequences) <= self.perplexity_ratio * best
