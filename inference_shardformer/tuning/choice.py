"""The choice among measured backends: a function of the rows alone, so that equal rows give an equal choice anywhere.

A backend is eligible if it has a valid row in every bucket. Its score is the weighted geometric mean, over the buckets,
of its time relative to the fastest eligible backend's. Ratios make a bucket of microseconds count as much as one of
milliseconds. Decode weighs two, prefill and mixed one each, shared equally by the buckets of the phase: a generation
spends most of its steps decoding. The lowest score wins, and of equal scores the first name in the alphabet.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from inference_shardformer.errors import BackendUnavailableError
from inference_shardformer.tuning.buckets import Bucket, Phase
from inference_shardformer.tuning.measurement import Measurement

PHASE_WEIGHTS: Mapping[Phase, float] = {"decode": 2.0, "prefill": 1.0, "mixed": 1.0}
_TICK_S = 1e-9


class Standing(NamedTuple):
    """An eligible backend; 1 would be the fastest in every bucket, 2 twice as slow as that."""

    backend: str
    score: float


def choose(rows: Sequence[Measurement]) -> str:
    """The best backend. Raises `BackendUnavailableError` if none is right and timed in every bucket."""
    ranked = standings(rows)
    if not ranked:
        problems = dict.fromkeys(f"{row.backend}, {row.bucket}: {row.problem}" for row in rows if row.problem)
        raise BackendUnavailableError(
            "\n  ".join(["no attention backend is right in every bucket that was measured", *problems]),
            remedy="`inference-shardformer doctor` examines every backend; report this with its output",
        )
    return ranked[0].backend


def standings(rows: Sequence[Measurement]) -> tuple[Standing, ...]:
    """Every eligible backend, the best first."""
    times = {(row.backend, row.bucket): row.seconds for row in rows if row.is_valid and row.seconds is not None}
    buckets = sorted({row.bucket for row in rows})
    names = sorted({row.backend for row in rows})
    eligible = [name for name in names if all((name, bucket) in times for bucket in buckets)]
    if not eligible:
        return ()
    weights = _weights(buckets)
    best = {bucket: min(times[name, bucket] for name in eligible) for bucket in buckets}

    def score(name: str) -> float:
        return math.exp(math.fsum(weights[each] * math.log(_ratio(times[name, each], best[each])) for each in buckets))

    return tuple(
        sorted((Standing(name, score(name)) for name in eligible), key=lambda each: (each.score, each.backend))
    )


def praise(rows: Sequence[Measurement], chosen: str) -> str:
    """Why the chosen backend is the choice, in a few words."""
    ranked = standings(rows)
    num_backends = len({row.backend for row in rows})
    if len(ranked) < 2:
        return f"the only one of {num_backends} that is right" if num_backends > 1 else "the only one that can serve"
    own = next(each for each in ranked if each.backend == chosen)
    rival = next(each for each in ranked if each.backend != chosen)
    return f"fastest of {num_backends}, {rival.score / own.score:.2g} x faster than {rival.backend}"


def _weights(buckets: Sequence[Bucket]) -> dict[Bucket, float]:
    """The share of each bucket; all of them make one."""
    sizes = Counter(bucket.phase for bucket in buckets)
    total = math.fsum(PHASE_WEIGHTS[phase] for phase in sorted(sizes))
    return {bucket: PHASE_WEIGHTS[bucket.phase] / total / sizes[bucket.phase] for bucket in buckets}


def _ratio(seconds: float, best: float) -> float:
    """How much slower than the best; what is below a clock's tick counts as one tick."""
    return max(seconds, _TICK_S) / max(best, _TICK_S)
