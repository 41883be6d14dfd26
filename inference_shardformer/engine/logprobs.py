"""TokenLogprobs: the log-probability of a token, and of the likeliest ones in its place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Logprob:
    """One token: `logprob` is natural, of the unchanged model; `rank` 1 is the likeliest, the lower id among equals."""

    token_id: int
    logprob: float
    rank: int


@dataclass(frozen=True)
class TokenLogprobs:
    """The token that was chosen, and the likeliest ones in order of their ranks, from 1.

    `top` has as many as were asked for, or fewer where all others have no probability at all. The chosen one is in it
    if its rank is that low.
    """

    chosen: Logprob
    top: tuple[Logprob, ...] = ()


def unpacked(row: Sequence[float], token_id: int, num_top: int) -> TokenLogprobs:
    """What a row of `Scorer.score_on_device` says about `token_id` and the `num_top` likeliest."""
    logprob, rank, *rest = row
    num_known = len(rest) // 2
    pairs = zip(rest[:num_top], rest[num_known : num_known + num_top], strict=True)
    top = [Logprob(int(likely), value, place) for place, (likely, value) in enumerate(pairs, start=1)]
    return TokenLogprobs(
        Logprob(token_id, logprob, int(rank)), tuple(each for each in top if each.logprob > -float("inf"))
    )
