"""The contract of an attention backend: facts it is chosen by, one plan a step, write and attend a layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch

from inference_shardformer.kv_cache.cache import LayerKVCache, PagedKVCache


@dataclass(frozen=True)
class AttentionSpec:
    """What a backend must serve on one rank. Head counts are those of this rank.

    `scale` multiplies the scores before the softmax. `sliding_window` is the number of tokens a query sees, itself
    included; `None` means all of them.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    dtype: torch.dtype
    device: torch.device
    block_size: int
    sliding_window: int | None = None


class Reason(NamedTuple):
    """Why a backend cannot serve a spec: a stable code, a sentence with the values, and what to do about it."""

    code: str
    message: str
    remedy: str


@dataclass(frozen=True)
class RaggedBatch:
    """One packed batch: prefill, chunked prefill and decode alike. Sequences with one query token come first.

    The lists repeat the tensors on the host, so that planning never waits for a device.
    """

    cu_seqlens_q: torch.Tensor  # int32 [num_seqs + 1], start of each sequence's queries in the packed tokens
    seq_lens: torch.Tensor  # int32 [num_seqs], tokens visible to the last query, this step's tokens included
    block_tables: torch.Tensor  # int32 [num_seqs, max_blocks], unused entries are 0
    slot_mapping: torch.Tensor  # int64 [num_tokens], where each token's key and value are written
    host_query_lens: Sequence[int]  # [num_seqs], query tokens of each sequence in this step
    host_seq_lens: Sequence[int]  # [num_seqs], the same values as seq_lens
    num_decodes: int  # how many leading sequences have exactly one query token

    @property
    def num_seqs(self) -> int:
        """Number of sequences in the batch."""
        return len(self.host_seq_lens)

    @property
    def num_tokens(self) -> int:
        """Number of packed query tokens."""
        return int(self.slot_mapping.shape[0])


@dataclass(frozen=True)
class AttentionMetadata:
    """What every layer of one step shares. A backend subclasses it to carry its own plan."""

    batch: RaggedBatch
    kv_cache: PagedKVCache


class AttentionBackend(ABC):
    """Paged, ragged, causal attention of one model on one rank. Built once, before any weight is read."""

    name: ClassVar[str]
    contract_version: ClassVar[int] = 1

    def __init__(self, spec: AttentionSpec) -> None:
        self.spec = spec

    @classmethod
    @abstractmethod
    def reasons(cls, spec: AttentionSpec) -> list[Reason]:
        """Every reason why this backend cannot serve `spec`; an empty list means that it can. Has no side effects."""

    @abstractmethod
    def plan(self, batch: RaggedBatch, kv_cache: PagedKVCache) -> AttentionMetadata:
        """Prepare one step; every layer reuses the result."""

    def write(self, k: torch.Tensor, v: torch.Tensor, cache: LayerKVCache, meta: AttentionMetadata) -> None:
        """Store this step's keys and values, each `[num_tokens, num_kv_heads, head_dim]`, at the batch's slots."""
        cache.keys.flatten(0, 1).index_copy_(0, meta.batch.slot_mapping, k)
        cache.values.flatten(0, 1).index_copy_(0, meta.batch.slot_mapping, v)

    @abstractmethod
    def attend(self, q: torch.Tensor, cache: LayerKVCache, meta: AttentionMetadata) -> torch.Tensor:
        """Attend to everything written so far: `[num_tokens, num_heads, head_dim]` in and out.

        Query `i` of a sequence with `n` query tokens and `s` visible tokens stands at position `s - n + i` and sees
        the positions up to its own.
        """
