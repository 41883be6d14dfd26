"""A backend that keeps its cache with the heads first, and one that only says so."""

from __future__ import annotations

from dataclasses import replace

import torch

from backend_zoo.sound import SoundAttention
from inference_shardformer.attention.base import KVLayout

HND = replace(SoundAttention.capabilities, kv_layout=KVLayout.HND)


class SoundHnd(SoundAttention):
    """Nothing is wrong with it: `[num_blocks, num_kv_heads, block_size, head_dim]`."""

    name = "sound_hnd"
    capabilities = HND

    def write(self, k, v, cache, meta):
        blocks, offsets = self.places(meta.batch.slot_mapping)
        cache.keys[blocks, :, offsets] = k.to(cache.keys.dtype)
        cache.values[blocks, :, offsets] = v.to(cache.values.dtype)

    def gather(self, cache, batch, seq):
        blocks, offsets = self.places(self.slots(batch, seq, torch.arange(batch.host_seq_lens[seq])))
        return cache.keys[blocks, :, offsets], cache.values[blocks, :, offsets]

    def places(self, slots):
        return slots // self.spec.block_size, slots % self.spec.block_size


class HndInNameOnly(SoundAttention):
    """Takes the memory for the usual layout, in which it agrees with itself and with nobody else."""

    name = "hnd_in_name_only"
    capabilities = HND

    def write(self, k, v, cache, meta):
        super().write(k, v, self.usual(cache), meta)

    def gather(self, cache, batch, seq):
        return super().gather(self.usual(cache), batch, seq)

    def usual(self, cache):
        shape = (-1, self.spec.block_size, self.spec.num_kv_heads, self.spec.head_dim)
        return type(cache)(cache.keys.view(shape), cache.values.view(shape))
