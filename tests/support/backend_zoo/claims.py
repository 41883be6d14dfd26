"""Backends that do not keep their word."""

from __future__ import annotations

from dataclasses import replace

import torch

from backend_zoo.sound import SoundAttention
from inference_shardformer.attention.base import Feature, Reason, Sizes


class ClaimsFloat16(SoundAttention):
    """Declares fp16 and cannot run it."""

    name = "claims_float16"
    capabilities = replace(SoundAttention.capabilities, dtypes=(torch.float32, torch.float16))

    def attend_all(self, q, cache, meta, sinks):
        if q.dtype == torch.float16:
            raise NotImplementedError("no kernel for Half")
        return super().attend_all(q, cache, meta, sinks)


class ClaimsHeadDim64(SoundAttention):
    """Declares a head dimension of 64 and uses half of it."""

    name = "claims_head_dim_64"
    capabilities = replace(SoundAttention.capabilities, head_dims=Sizes.only(16, 32, 64))

    def attend_one(self, q, cache, meta, seq, sinks):
        if q.shape[-1] == 64:
            q = torch.cat((q[..., :32], torch.zeros_like(q[..., 32:])), dim=-1)
        return super().attend_one(q, cache, meta, seq, sinks)


class OneBlockSize(SoundAttention):
    """Declares blocks of 4 and takes all blocks to be of 16."""

    name = "one_block_size"

    def slots(self, batch, seq, positions):
        found = batch.block_tables[seq].long()[positions // 16] * 16 + positions % 16
        return found.clamp(max=(int(batch.block_tables.max()) + 1) * self.spec.block_size - 1)


class NoSuchPair(SoundAttention):
    """Runs bf16 and runs head dimension 32, but drops the last element of bf16 heads of 32."""

    name = "no_such_pair"

    def attend_one(self, q, cache, meta, seq, sinks):
        if q.dtype == torch.bfloat16 and q.shape[-1] == 32:
            q = torch.cat((q[..., :16], torch.zeros_like(q[..., 16:])), dim=-1)
        return super().attend_one(q, cache, meta, seq, sinks)


class RefusesHeadDim32(SoundAttention):
    """Declares it, and has an extra reason against it every time."""

    name = "refuses_head_dim_32"

    @classmethod
    def extra_reasons(cls, spec):
        return [Reason("mood", "32 is not to its taste", "use 16")] if spec.head_dim == 32 else []


class RefusesNothing(SoundAttention):
    """Says yes to everything."""

    name = "refuses_nothing"

    @classmethod
    def reasons(cls, spec):
        return []


class ChangesItsMind(SoundAttention):
    """Refuses every other time."""

    name = "changes_its_mind"
    asked = 0

    @classmethod
    def extra_reasons(cls, spec):
        cls.asked += 1
        return [Reason("mood", "not now", "ask again")] if cls.asked % 2 else []


class ClaimsKeysInBfloat16(SoundAttention):
    """Declares keys and values in bf16 and writes fp32 ones into them."""

    name = "claims_keys_in_bfloat16"
    capabilities = replace(SoundAttention.capabilities, kv_dtypes=(torch.bfloat16,))

    def write(self, k, v, cache, meta):
        for stored, new in zip(cache, (k, v), strict=True):
            stored.flatten(0, 1).index_copy_(0, meta.batch.slot_mapping, new)


class SecretSinks(SoundAttention):
    """Has sinks and does not say so."""

    name = "secret_sinks"
    capabilities = replace(SoundAttention.capabilities, features=SoundAttention.capabilities.features - {Feature.SINKS})


class CannotBeBuilt(SoundAttention):
    """Its library is not there, which nobody was told."""

    name = "cannot_be_built"

    def __init__(self, spec):
        raise ImportError("libzoo.so: cannot open shared object file")


class KeysInBfloat16(SoundAttention):
    """Declares keys and values in bf16 and rounds them as it writes. Nothing is wrong with it."""

    name = "keys_in_bfloat16"
    capabilities = replace(SoundAttention.capabilities, kv_dtypes=(torch.bfloat16,))

    def write(self, k, v, cache, meta):
        super().write(k.to(cache.keys.dtype), v.to(cache.values.dtype), cache, meta)


class FromTheFuture(SoundAttention):
    """Written for a contract that does not exist yet."""

    name = "from_the_future"
    contract_version = 99


class WithoutVersion(SoundAttention):
    """Does not say for which contract it was written."""

    name = "without_version"
    contract_version = None


class WithoutFacts(SoundAttention):
    """Declares nothing."""

    name = "without_facts"
    capabilities = None


class OtherSpec(SoundAttention):
    """Rounds its scale to fp32, in the spec that models read from it too."""

    name = "other_spec"

    def __init__(self, spec):
        super().__init__(replace(spec, scale=torch.tensor(spec.scale).item()))
