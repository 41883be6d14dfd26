"""From logits to the drawn token: temperature, top-k, top-p, and a draw that only depends on seed and count."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from hashlib import blake2b

import torch

from inference_shardformer.engine.staging import staged


def drawn(
    logits: torch.Tensor,
    *,
    temperatures: Sequence[float],
    top_ks: Sequence[int],
    top_ps: Sequence[float],
    uniforms: Sequence[float],
) -> torch.Tensor:
    """Token ids, int64 `[num_rows]`, of `logits` `[num_rows, vocab_size]`, with torch."""
    return draw(probabilities(logits, temperatures, top_ks, top_ps), uniforms)


def probabilities(
    logits: torch.Tensor, temperatures: Sequence[float], top_ks: Sequence[int], top_ps: Sequence[float]
) -> torch.Tensor:
    """The distribution each row is drawn from, float32 `[num_rows, vocab_size]` in and out.

    As in Hugging Face: divide by the temperature, keep the `top_k` likeliest (and those equal to the last of them),
    then the fewest whose probability reaches `top_p`, at least one.
    """
    divisors = staged(temperatures, logits.dtype, logits.device)
    scores = (logits - logits.amax(dim=-1, keepdim=True)) / divisors.unsqueeze(-1)
    _drop_beyond_top_k(scores, top_ks)
    _drop_beyond_top_p(scores, top_ps)
    return scores.softmax(dim=-1)


def drop_unlikely(logits: torch.Tensor, temperatures: Sequence[float], min_ps: Sequence[float]) -> None:
    """Leave no logit, in place, to tokens that are less likely than `min_p` times the likeliest one of their row."""
    rows = [row for row, min_p in enumerate(min_ps) if min_p > 0.0]
    if not rows:
        return
    places = staged(rows, torch.int64, logits.device)
    chosen = logits[places]
    margins = staged([temperatures[row] * math.log(min_ps[row]) for row in rows], logits.dtype, logits.device)
    dropped = chosen - chosen.amax(dim=-1, keepdim=True) < margins.unsqueeze(-1)
    logits[places] = chosen.masked_fill(dropped, -torch.inf)


def draw(probs: torch.Tensor, uniforms: Sequence[float]) -> torch.Tensor:
    """Token ids, int64 `[num_rows]`: where each row's cumulative probability first exceeds its number in [0, 1).

    A row's result depends on that row alone, and tokens of probability 0 are never drawn.
    """
    cumulative = probs.double().cumsum(dim=-1)
    thresholds = staged(uniforms, torch.float64, probs.device).unsqueeze(-1) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, thresholds, right=True).squeeze(-1)


def derived_seed(seed: int, number: int) -> int:
    """The seed of the `number`-th request of an engine, if it brings none: equal prompts draw differently."""
    digest = blake2b(struct.pack("<QQ", seed, number), digest_size=8, person=b"request").digest()
    return int.from_bytes(digest, "little") >> 1


def uniform(seed: int, count: int) -> float:
    """A number in [0, 1) that is a function of `seed` and `count`; 52 bits, so that it stays below 1 when scaled."""
    digest = blake2b(struct.pack("<QQ", seed, count), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 12) * 2.0**-52


def _drop_beyond_top_k(scores: torch.Tensor, top_ks: Sequence[int]) -> None:
    vocab_size = scores.shape[-1]
    rows = [row for row, top_k in enumerate(top_ks) if 0 < top_k < vocab_size]
    if not rows:
        return
    kept = [top_ks[row] for row in rows]
    places = staged(rows, torch.int64, scores.device)
    chosen = scores[places]
    last_rank = staged(kept, torch.int64, scores.device).unsqueeze(-1) - 1
    last_kept = chosen.topk(max(kept), dim=-1).values.gather(-1, last_rank)
    scores[places] = chosen.masked_fill(chosen < last_kept, -torch.inf)


def _drop_beyond_top_p(scores: torch.Tensor, top_ps: Sequence[float]) -> None:
    rows = [row for row, top_p in enumerate(top_ps) if top_p < 1.0]
    if not rows:
        return
    places = staged(rows, torch.int64, scores.device)
    chosen = scores[places]
    limits = staged([top_ps[row] for row in rows], torch.float64, scores.device).unsqueeze(-1)
    ordered, order = chosen.sort(dim=-1, descending=True, stable=True)
    probs = ordered.softmax(dim=-1).double()
    likelier = probs.cumsum(dim=-1) - probs  # probability of everything before a token
    dropped = torch.zeros_like(chosen, dtype=torch.bool).scatter(-1, order, likelier >= limits)
    scores[places] = chosen.masked_fill(dropped, -torch.inf)
