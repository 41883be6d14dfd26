"""Backends that change what is not theirs, or read it."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from backend_zoo.sound import SoundAttention
from inference_shardformer.attention.base import AttentionMetadata


class WritesPastTheSlot(SoundAttention):
    """Pads every write with one more token."""

    name = "writes_past_the_slot"

    def write(self, k, v, cache, meta):
        flat, slots = cache.keys.flatten(0, 1), meta.batch.slot_mapping
        flat[(slots + 1).clamp(max=len(flat) - 1)] = 0
        super().write(k, v, cache, meta)


class SwapsKeysAndValues(SoundAttention):
    """Writes keys where values belong, and reads them there."""

    name = "swaps_keys_and_values"

    def write(self, k, v, cache, meta):
        super().write(v, k, cache, meta)


class WritesLate(SoundAttention):
    """Stores this step's keys with the next call only."""

    name = "writes_late"

    def write(self, k, v, cache, meta):
        self.held = k, v

    def attend_all(self, q, cache, meta, sinks):
        super().write(*self.held, cache, meta)
        return super().attend_all(q, cache, meta, sinks)


class ReadsTheTail(SoundAttention):
    """Reads whole blocks and hides what lies behind the end with a penalty that large scores overcome."""

    name = "reads_the_tail"

    def gather(self, cache, batch, seq):
        size = self.spec.block_size
        padded = -(-batch.host_seq_lens[seq] // size) * size
        slots = self.slots(batch, seq, torch.arange(padded))
        return tuple(tensor.flatten(0, 1)[slots].nan_to_num(0.0) for tensor in cache)

    def softmax(self, scores, visible, sinks):
        seen = torch.ones_like(visible)
        return super().softmax(torch.where(visible, scores, scores - 1e4), seen, sinks)


class ScalesQueriesInPlace(SoundAttention):
    """Saves a tensor by changing the model's."""

    name = "scales_queries_in_place"

    def attend_all(self, q, cache, meta, sinks):
        q.mul_(self.spec.scale)
        return super().attend_all(q, cache, meta, sinks)

    def scaled(self, scores):
        return super().scaled(scores / self.spec.scale)


class ScalesKeysInPlace(SoundAttention):
    """Changes the keys it is handed, after it wrote them."""

    name = "scales_keys_in_place"

    def write(self, k, v, cache, meta):
        super().write(k, v, cache, meta)
        k.mul_(self.spec.scale)


class RewritesTheBlockTable(SoundAttention):
    """Turns block ids into first slots, in the engine's own tensor, and back after the last layer it expects."""

    name = "rewrites_the_block_table"

    def plan(self, batch, kv_cache):
        batch.block_tables.mul_(self.spec.block_size)
        return super().plan(batch, kv_cache)

    def slots(self, batch, seq, positions):
        size = self.spec.block_size
        return batch.block_tables[seq].long()[positions // size] + positions % size


class PlanClearsTheCache(SoundAttention):
    """Wipes the slots of the step while planning, as a precaution."""

    name = "plan_clears_the_cache"

    def plan(self, batch, kv_cache):
        for tensor in kv_cache.layer(0):
            tensor.flatten(0, 1)[batch.slot_mapping] = 0
        return super().plan(batch, kv_cache)


class ContiguousOnly(SoundAttention):
    """Flattens with view()."""

    name = "contiguous_only"

    def attend_all(self, q, cache, meta, sinks):
        return super().attend_all(q.view(-1).view(q.shape), cache, meta, sinks)


@dataclass(frozen=True)
class CountingMetadata(AttentionMetadata):
    uses: torch.Tensor


class CountsInThePlan(SoundAttention):
    """Counts layers in a tensor made while planning, which an inference tensor forbids elsewhere."""

    name = "counts_in_the_plan"

    def plan(self, batch, kv_cache):
        return CountingMetadata(batch, kv_cache, torch.zeros(1))

    def attend_all(self, q, cache, meta, sinks):
        meta.uses.add_(1)
        return super().attend_all(q, cache, meta, sinks)


class SeedsTorch(SoundAttention):
    """Sets the random state of the whole process."""

    name = "seeds_torch"

    def __init__(self, spec):
        super().__init__(spec)
        torch.manual_seed(1234)


class SetsVariables(SoundAttention):
    """Talks to its library through the environment."""

    name = "sets_variables"

    def plan(self, batch, kv_cache):
        os.environ["ZOO_PLANNED_STEPS"] = str(int(os.environ.get("ZOO_PLANNED_STEPS", "0")) + 1)
        return super().plan(batch, kv_cache)
