"""The plan of backend `sdpa`: which slots each SDPA call gathers and which mask it needs, made once per step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from inference_shardformer.attention.base import AttentionSpec, RaggedBatch


class GroupLimits(NamedTuple):
    """What one call for several decoding sequences may gather, and how much of that may be padding, in bytes."""

    size: int
    padding: int


# CPU, as measured: what a call gathers should still be in a core's cache when it is read back, and one more call costs
# about as much as the padding. CUDA: a launch costs as much as moving megabytes, and memory is the only other limit.
LIMITS = {"cpu": GroupLimits(3 << 19, 9 << 14), "cuda": GroupLimits(1 << 28, 1 << 23)}


@dataclass(frozen=True)
class DecodeGroup:
    """Sequences of similar length, each with one query token, served by one SDPA call.

    Places past a sequence's end are masked, and repeat its own last slot: nothing that another sequence left in the
    cache is ever read, because a masked NaN would still spoil the result (0 * NaN).
    """

    rows: slice  # place of these sequences in the sorted order
    num_keys: int  # keys of the longest sequence
    slots: torch.Tensor  # int64 [len(rows) * num_keys]
    mask: torch.Tensor | None  # added to the scores, [len(rows), 1, 1, num_keys]; None: all are equally long


@dataclass(frozen=True)
class DecodePlan:
    """All decoding sequences. `order` sorts them by length and `inverse` undoes it; `None` if they come sorted."""

    groups: tuple[DecodeGroup, ...]
    order: torch.Tensor | None  # int64 [num_decodes]
    inverse: torch.Tensor | None  # int64 [num_decodes]


@dataclass(frozen=True)
class PrefillCall:
    """One sequence with its query tokens."""

    tokens: slice  # place of the queries in the packed tokens
    slots: torch.Tensor  # int64 [num_keys], keys in order of position; the last one is the last query's own
    mask: torch.Tensor | None  # added to the scores, [query_len, num_keys]; None: causal, no past, no window


def plan_decodes(batch: RaggedBatch, spec: AttentionSpec) -> DecodePlan | None:
    """Group the leading `num_decodes` sequences by length; `None` if there are none."""
    seq_lens = list(batch.host_seq_lens[: batch.num_decodes])
    if not seq_lens:
        return None
    window = spec.sliding_window or max(seq_lens)
    num_keys = [min(seq_len, window) for seq_len in seq_lens]
    order = sorted(range(len(num_keys)), key=num_keys.__getitem__)
    tables = batch.block_tables[: batch.num_decodes].long()
    if order == list(range(len(order))):
        order_index = inverse = None
    else:
        order_index = torch.tensor(order, device=spec.device)
        inverse = torch.argsort(order_index)
        tables = tables.index_select(0, order_index)
        seq_lens, num_keys = [seq_lens[i] for i in order], [num_keys[i] for i in order]
    groups = tuple(_decode_groups(tables, seq_lens, num_keys, spec))
    return DecodePlan(groups=groups, order=order_index, inverse=inverse)


def _decode_groups(
    tables: torch.Tensor,  # int64 [num_seqs, max_blocks], sorted by num_keys
    seq_lens: list[int],
    num_keys: list[int],
    spec: AttentionSpec,
) -> list[DecodeGroup]:
    last = torch.tensor(seq_lens, device=spec.device)[:, None] - 1  # position of each query
    counts = torch.tensor(num_keys, device=spec.device)[:, None]
    first = last - counts + 1
    steps = torch.arange(num_keys[-1], device=spec.device)
    bytes_per_token = 2 * spec.num_kv_heads * spec.head_dim * spec.dtype.itemsize
    groups = []
    for rows in group_by_length(num_keys, bytes_per_token=bytes_per_token, limits=LIMITS[spec.device.type]):
        longest = num_keys[rows.stop - 1]
        positions = torch.minimum(first[rows] + steps[:longest], last[rows])  # [len(rows), longest]
        slots = _slots(tables[rows], positions, spec.block_size).flatten()
        ragged = num_keys[rows.start] < longest
        mask = _additive(steps[:longest] < counts[rows], spec)[:, None, None] if ragged else None
        groups.append(DecodeGroup(rows=rows, num_keys=longest, slots=slots, mask=mask))
    return groups


def group_by_length(lengths: Sequence[int], *, bytes_per_token: int, limits: GroupLimits) -> list[slice]:
    """Cut ascending lengths into runs within the limits; a longer sequence is a run of its own."""
    groups: list[slice] = []
    start, total = 0, 0
    for i, length in enumerate(lengths):
        padded = (i - start + 1) * length
        padding = padded - total - length
        if i > start and (padded * bytes_per_token > limits.size or padding * bytes_per_token > limits.padding):
            groups.append(slice(start, i))
            start, total = i, 0
        total += length
    return [*groups, slice(start, len(lengths))]


def plan_prefills(batch: RaggedBatch, spec: AttentionSpec) -> tuple[PrefillCall, ...]:
    """One call for each sequence after the decoding ones."""
    calls = []
    start = batch.num_decodes
    for seq in range(batch.num_decodes, batch.num_seqs):
        end = start + batch.host_query_lens[seq]
        calls.append(_prefill_call(batch, spec, seq, slice(start, end)))
        start = end
    return tuple(calls)


def _prefill_call(batch: RaggedBatch, spec: AttentionSpec, seq: int, tokens: slice) -> PrefillCall:
    query_len, seq_len = tokens.stop - tokens.start, batch.host_seq_lens[seq]
    window = spec.sliding_window or seq_len
    if query_len == seq_len <= window:
        return PrefillCall(tokens=tokens, slots=batch.slot_mapping[tokens], mask=None)
    first = max(0, seq_len - query_len - window + 1)  # the oldest key that the first query sees
    keys = torch.arange(first, seq_len, device=spec.device)
    queries = torch.arange(seq_len - query_len, seq_len, device=spec.device)[:, None]
    slots = _slots(batch.block_tables[seq : seq + 1].long(), keys[None], spec.block_size)[0]
    visible = (keys <= queries) & (keys > queries - window)
    return PrefillCall(tokens=tokens, slots=slots, mask=_additive(visible, spec))


def _slots(tables: torch.Tensor, positions: torch.Tensor, block_size: int) -> torch.Tensor:
    """Slots of each sequence's positions; both arguments and the result are `[num_seqs, ...]`."""
    return tables.gather(1, positions // block_size) * block_size + positions % block_size


def _additive(visible: torch.Tensor, spec: AttentionSpec) -> torch.Tensor:
    """0 where visible, -inf elsewhere. On a CPU fp32 masks are the fast ones; CUDA wants the type of the queries."""
    dtype = torch.float32 if spec.device.type == "cpu" else spec.dtype
    return torch.zeros(visible.shape, dtype=dtype, device=spec.device).masked_fill_(~visible, -math.inf)
