"""Backends whose steps, sequences or instances get in each other's way, or that never let go."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from backend_zoo.sound import SoundAttention
from inference_shardformer.attention.base import AttentionMetadata


class PadsToTheLongest(SoundAttention):
    """Pads every sequence to the longest of the batch with keys of zeros, and does not mask them."""

    name = "pads_to_the_longest"

    def attend_one(self, q, cache, meta, seq, sinks):
        self.padding = max(meta.batch.host_seq_lens) - meta.batch.host_seq_lens[seq]
        return super().attend_one(q, cache, meta, seq, sinks)

    def softmax(self, scores, visible, sinks):
        weights = super().softmax(scores, visible, sinks)
        kept = scores.masked_fill(~visible, -torch.inf).logsumexp(dim=-1, keepdim=True)
        return weights / (1 + self.padding * torch.exp(-kept))


class SpreadsNaN(SoundAttention):
    """Multiplies the values of other sequences by zero and adds them."""

    name = "spreads_nan"

    def attend_all(self, q, cache, meta, sinks):
        new = cache.values.flatten(0, 1)[meta.batch.slot_mapping]
        return super().attend_all(q, cache, meta, sinks) + 0 * new.sum()


class Jitters(SoundAttention):
    """Adds noise below every tolerance, as an unordered reduction does."""

    name = "jitters"
    source = torch.Generator().manual_seed(0)

    def attend_all(self, q, cache, meta, sinks):
        out = super().attend_all(q, cache, meta, sinks)
        noise = torch.rand(out.shape, generator=self.source)
        return out * (1 + 1e-6 * noise) if out.dtype == torch.float32 else out


class PlansOnce(SoundAttention):
    """Keeps its first plan for batches of the same number of sequences."""

    name = "plans_once"

    def __init__(self, spec):
        super().__init__(spec)
        self.plans = []

    def plan(self, batch, kv_cache):
        if not self.plans:
            self.plans.append(super().plan(batch, kv_cache))
        return self.plans[0]


class SharesOneSpec(SoundAttention):
    """All instances work with the latest spec."""

    name = "shares_one_spec"
    latest = None

    def __init__(self, spec):
        super().__init__(spec)
        SharesOneSpec.latest = spec

    def attend_all(self, q, cache, meta, sinks):
        self.spec = SharesOneSpec.latest
        return super().attend_all(q, cache, meta, sinks)


@dataclass(frozen=True)
class RememberingMetadata(AttentionMetadata):
    gathered: dict = field(default_factory=dict)


class RemembersTheFirstLayer(SoundAttention):
    """Gathers keys and values once for all layers of a step."""

    name = "remembers_the_first_layer"

    def plan(self, batch, kv_cache):
        return RememberingMetadata(batch, kv_cache)

    def attend_one(self, q, cache, meta, seq, sinks):
        self.gathered = meta.gathered
        return super().attend_one(q, cache, meta, seq, sinks)

    def gather(self, cache, batch, seq):
        if seq not in self.gathered:
            self.gathered[seq] = super().gather(cache, batch, seq)
        return self.gathered[seq]


class KeepsOutputs(SoundAttention):
    """Keeps every output, for statistics."""

    name = "keeps_outputs"

    def __init__(self, spec):
        super().__init__(spec)
        self.kept = []

    def attend_all(self, q, cache, meta, sinks):
        self.kept.append(super().attend_all(q, cache, meta, sinks))
        return self.kept[-1].clone()


class KeepsPlans(SoundAttention):
    """Keeps the metadata of every step, which holds no new tensor."""

    name = "keeps_plans"

    def __init__(self, spec):
        super().__init__(spec)
        self.kept = []

    def plan(self, batch, kv_cache):
        self.kept.append(super().plan(batch, kv_cache))
        return self.kept[-1]


class KeepsHostBuffers(SoundAttention):
    """Joins what it learns into one growing host buffer."""

    name = "keeps_host_buffers"

    def __init__(self, spec):
        super().__init__(spec)
        self.buffer = np.zeros(0)

    def plan(self, batch, kv_cache):
        self.buffer = np.concatenate([self.buffer, np.zeros(1024)])
        return super().plan(batch, kv_cache)
