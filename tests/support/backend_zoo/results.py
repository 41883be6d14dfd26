"""Backends whose results are wrong."""

from __future__ import annotations

import torch

from backend_zoo.sound import SoundAttention


class SeesTheNext(SoundAttention):
    """The mask lets a query see one token too many."""

    name = "sees_the_next"

    def visible(self, queries, keys):
        return super().visible(queries + 1, keys)


class NotCausal(SoundAttention):
    """A prompt sees itself whole."""

    name = "not_causal"

    def visible(self, queries, keys):
        return super().visible(queries.max().expand_as(queries), keys)


class MissesItself(SoundAttention):
    """The mask leaves out the query's own token, unless it is alone."""

    name = "misses_itself"

    def visible(self, queries, keys):
        return super().visible(queries - (queries > 0).long(), keys)


class NoBlockTable(SoundAttention):
    """Takes the blocks of a sequence to lie behind each other."""

    name = "no_block_table"

    def slots(self, batch, seq, positions):
        return (batch.block_tables[seq, 0].long() * self.spec.block_size + positions).clamp(
            max=int(batch.block_tables.max()) * self.spec.block_size
        )


class InterleavedHeads(SoundAttention):
    """Deals the query heads out to the key heads in turns."""

    name = "interleaved_heads"

    def owner(self, num_heads):
        return [head % self.spec.num_kv_heads for head in range(num_heads)]


class UsualScale(SoundAttention):
    """Scales by the head dimension, whatever the model says."""

    name = "usual_scale"

    def scaled(self, scores):
        return super().scaled(scores / self.spec.scale * self.spec.head_dim**-0.5)


class NoWindow(SoundAttention):
    """Sees everything."""

    name = "no_window"

    def visible(self, queries, keys):
        return keys <= queries


class WideWindow(SoundAttention):
    """Sees one token more than the window."""

    name = "wide_window"

    def visible(self, queries, keys):
        window = self.spec.sliding_window
        return keys <= queries if window is None else (keys <= queries) & (keys >= queries - window)


class NoSoftcap(SoundAttention):
    """Forgets the cap."""

    name = "no_softcap"

    def scaled(self, scores):
        return scores * self.spec.scale


class CapsBeforeScaling(SoundAttention):
    """Caps the raw products, then scales."""

    name = "caps_before_scaling"

    def scaled(self, scores):
        cap = self.spec.softcap
        return (scores if cap is None else cap * torch.tanh(scores / cap)) * self.spec.scale


class NoSinks(SoundAttention):
    """Takes the sinks and drops them."""

    name = "no_sinks"

    def attend_with_sinks(self, q, cache, meta, sinks):
        return self.attend(q, cache, meta)


class PlainExp(SoundAttention):
    """A softmax without taking the largest score out."""

    name = "plain_exp"

    def softmax(self, scores, visible, sinks):
        weights = scores.exp() * visible
        sink = 0 if sinks is None else sinks.float().exp()[:, None, None]
        return weights / (weights.sum(dim=-1, keepdim=True) + sink)


class AlwaysDouble(SoundAttention):
    """Returns another type than it was given."""

    name = "always_double"

    def attend_all(self, q, cache, meta, sinks):
        return super().attend_all(q, cache, meta, sinks).double()


class UpcastsSilently(SoundAttention):
    """Takes bf16 and returns fp32."""

    name = "upcasts_silently"

    def attend_all(self, q, cache, meta, sinks):
        return super().attend_all(q, cache, meta, sinks).float()


class DowncastsSilently(SoundAttention):
    """Computes fp32 in fp16."""

    name = "downcasts_silently"

    def scaled(self, scores):
        return super().scaled(scores).half().float()


class HeadsFirst(SoundAttention):
    """Returns `[num_heads, num_tokens, head_dim]`."""

    name = "heads_first"

    def attend_all(self, q, cache, meta, sinks):
        return super().attend_all(q, cache, meta, sinks).transpose(0, 1)


class Flat(SoundAttention):
    """Returns `[num_tokens, num_heads * head_dim]`."""

    name = "flat"

    def attend_all(self, q, cache, meta, sinks):
        return super().attend_all(q, cache, meta, sinks).flatten(1)
