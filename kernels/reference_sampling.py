"""Plain-torch twin of the sampling kernel, in float64 and by sorting."""

from __future__ import annotations

import torch


def sample(
    logits: torch.Tensor,  # [num_rows, vocab_size]
    *,
    temperatures: torch.Tensor,  # [num_rows], 0: the first of the likeliest
    top_ks: torch.Tensor,  # [num_rows], below 1: all
    top_ps: torch.Tensor,  # [num_rows], 1: all
    uniforms: torch.Tensor,  # [num_rows], in [0, 1)
) -> torch.Tensor:
    """Token ids, int64 `[num_rows]`: where the cumulative probability of what is kept first exceeds the number.

    Kept are the `top_k` likeliest and those equal to the last of them, of these the fewest whose probability reaches
    `top_p`, at least one, lower ids first among equals.
    """
    settings = zip(temperatures.tolist(), top_ks.tolist(), top_ps.tolist(), uniforms.tolist(), strict=True)
    ids = [_one(row, *each) for row, each in zip(logits, settings, strict=True)]
    return torch.tensor(ids, dtype=torch.int64, device=logits.device)


def _one(logits: torch.Tensor, temperature: float, top_k: int, top_p: float, uniform: float) -> int:
    if temperature == 0.0:
        return int((logits == logits.max()).nonzero()[0])
    scores = (logits.float() - logits.float().max()) / temperature  # rounded as it is everywhere, so that ties agree
    ordered, order = scores.sort(descending=True, stable=True)
    if 0 < top_k < len(scores):
        count = int((ordered >= ordered[top_k - 1]).sum())
        ordered, order = ordered[:count], order[:count]
    probs = ordered.double().softmax(dim=0)
    if top_p < 1.0:
        count = max(int((probs.cumsum(dim=0) - probs < top_p).sum()), 1)
        probs, order = probs[:count] / probs[:count].sum(), order[:count]
    by_id = torch.zeros(len(scores), dtype=torch.float64, device=logits.device).scatter(0, order, probs)
    cumulative = by_id.cumsum(dim=0)
    past = (cumulative > uniform * cumulative[-1]).nonzero()
    return int(past[0])
