"""Backends with scripted time and scripted error, and the clock that they advance; no test sleeps."""

from __future__ import annotations

from typing import ClassVar

import torch

from inference_shardformer.attention.base import AttentionMetadata, AttentionSpec, RaggedBatch
from inference_shardformer.attention.reference import ReferenceAttention
from inference_shardformer.attention.survey import BackendRegistry, make_registry
from inference_shardformer.kv_cache.cache import LayerKVCache, PagedKVCache
from inference_shardformer.plugins import Registry
from inference_shardformer.tuning.buckets import Bucket

SPEC = AttentionSpec(4, 2, 8, 8**-0.5, torch.float32, torch.device("cpu"), 4)


class FakeClock:
    """Stands still until somebody works."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


CLOCK = FakeClock()


class Scripted(ReferenceAttention):
    """The reference, with a price for each kind of batch and an error from some call on."""

    name: ClassVar[str] = "scripted"
    plan_seconds: ClassVar[float] = 0.0
    seconds: ClassVar[dict[str, list[float]]] = {}  # by phase, the price of each call; the last one stays
    error: ClassVar[float] = 0.0
    wrong_from: ClassVar[int] = 0
    raises_at: ClassVar[int] = -1

    def __init__(self, spec: AttentionSpec) -> None:
        super().__init__(spec)
        self.num_calls = 0
        self.num_by_phase: dict[str, int] = {}

    def plan(self, batch: RaggedBatch, kv_cache: PagedKVCache) -> AttentionMetadata:
        CLOCK.now += self.plan_seconds
        return super().plan(batch, kv_cache)

    def attend(self, q: torch.Tensor, cache: LayerKVCache, meta: AttentionMetadata) -> torch.Tensor:
        number, self.num_calls = self.num_calls, self.num_calls + 1
        if number == self.raises_at:
            raise OSError("the device is gone")
        phase = phase_of(meta.batch)
        prices = self.seconds.get(phase, [1.0])
        turn = self.num_by_phase.get(phase, 0)
        self.num_by_phase[phase] = turn + 1
        CLOCK.now += prices[min(turn, len(prices) - 1)]
        out = super().attend(q, cache, meta)
        return out + self.error if number >= self.wrong_from else out


def phase_of(batch: RaggedBatch) -> str:
    if batch.num_decodes == batch.num_seqs:
        return "decode"
    return "mixed" if batch.num_decodes else "prefill"


def scripted(name: str, **script: object) -> type[Scripted]:
    """A backend class of its own."""
    return type(name, (Scripted,), {"name": name, "__doc__": name, **script})


def registry_of(*backends: type[Scripted], alone: bool = False) -> BackendRegistry:
    """The built-in backends with these, or these alone."""
    registry = Registry("attention backend") if alone else make_registry()
    registry.names()
    for backend in backends:
        registry.register(backend.name, backend)
    return registry


BUCKETS = (Bucket("prefill", 1, 8), Bucket("decode", 2, 8), Bucket("mixed", 2, 8))
