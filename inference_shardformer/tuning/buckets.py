"""Bucket: one cell of the grid that backends are measured on: a phase, a batch size and a length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

from inference_shardformer.attention.base import AttentionSpec, Feature

Phase = Literal["prefill", "decode", "mixed"]
PHASES: tuple[Phase, ...] = get_args(Phase)
DEFAULT_BATCHES = (1, 8)
DEFAULT_LENGTHS = (128, 512)


class Bucket(NamedTuple):
    """A batch of sequences of one length in one phase.

    prefill: `batch` prompts of `length` tokens. decode: `batch` sequences of `length` tokens, the last of which is
    new. mixed: the same decodes, and one prompt of `length` tokens whose second half is new.
    """

    phase: Phase
    batch: int
    length: int

    def sequences(self) -> list[tuple[int, int]]:
        """Every sequence as (query tokens, visible tokens), decodes first."""
        if self.phase == "prefill":
            return [(self.length, self.length)] * self.batch
        decodes = [(1, self.length)] * self.batch
        return decodes if self.phase == "decode" else [*decodes, (max(1, self.length // 2), self.length)]

    @property
    def num_tokens(self) -> int:
        """Query tokens of one step."""
        return sum(query_len for query_len, _ in self.sequences())

    def __str__(self) -> str:
        return f"{self.phase} {self.batch} x {self.length}"


def grid(phases: Sequence[Phase], batches: Sequence[int], lengths: Sequence[int]) -> tuple[Bucket, ...]:
    """Every combination, each once, in the order of the arguments."""
    return tuple(
        dict.fromkeys(Bucket(phase, batch, length) for phase in phases for batch in batches for length in lengths)
    )


def served(buckets: Sequence[Bucket], spec: AttentionSpec) -> tuple[Bucket, ...]:
    """The buckets that a spec asks a backend for: a mixed one only where it mixes batches and cuts prompts."""
    mixes = {Feature.MIXED_BATCH, Feature.CHUNKED_PREFILL} <= spec.needs
    return tuple(bucket for bucket in buckets if mixes or bucket.phase != "mixed")
