"""ForwardBatch: the tensors of one step, packed from the lists of its requests."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch

from inference_shardformer.attention.base import RaggedBatch
from inference_shardformer.engine.request import Request
from inference_shardformer.engine.scheduler import SchedulerOutput
from inference_shardformer.kv_cache.sizing import blocks_for


@dataclass(frozen=True)
class ForwardBatch:
    """Everything one forward pass reads; `requests_to_sample[i]` owns row `i` of its logits."""

    input_ids: torch.Tensor  # int64 [1, num_tokens]
    position_ids: torch.Tensor  # int64 [1, num_tokens], or [2, num_tokens] where the second row holds rope lengths
    ragged: RaggedBatch
    logits_indices: torch.Tensor  # int64 [num_logits], packed tokens after which a token is sampled
    requests_to_sample: list[Request]


class BatchBuilder:
    """Packs the scheduled steps of one engine."""

    def __init__(
        self, *, block_size: int, device: torch.device, with_rope_lengths: bool, padding: Callable[[int, int], int]
    ) -> None:
        """`padding` says how many copies of its last sequence a step of so many decodes and sequences gets."""
        self._block_size = block_size
        self._device = device
        self._with_rope_lengths = with_rope_lengths
        self._padding = padding

    def __call__(self, output: SchedulerOutput, sampled: SampledTokens | None = None) -> ForwardBatch:
        """The tensors of a step; with `sampled` the device takes the token ids from there."""
        return build_batch(
            output,
            block_size=self._block_size,
            device=self._device,
            with_rope_lengths=self._with_rope_lengths,
            num_padding=self.num_padding(output),
            sampled=sampled,
        )

    def num_padding(self, output: SchedulerOutput) -> int:
        """How many copies of its last sequence a step gets at present."""
        return self._padding(output.num_decodes, len(output.scheduled))


class SampledTokens(NamedTuple):
    """Tokens that the device has sampled, or will have, and the host has not read: `rows[request]` is its own."""

    token_ids: torch.Tensor  # int64 [num_rows]
    rows: Mapping[Request, int]


def build_batch(
    output: SchedulerOutput,
    *,
    block_size: int,
    device: torch.device,
    with_rope_lengths: bool = False,
    num_padding: int = 0,
    sampled: SampledTokens | None = None,
) -> ForwardBatch:
    """Pack a scheduled step: one host buffer for each integer width, and one copy of it to a device.

    `num_padding` copies of its last sequence follow the others. They have logits, and no request to sample. With
    `sampled`, every request runs the one token that it does not know yet, which the device takes from there.
    """
    num_requests = len(output.scheduled)
    if num_padding:
        scheduled = output.scheduled + output.scheduled[-1:] * num_padding
        output = replace(output, scheduled=scheduled, num_decodes=output.num_decodes + num_padding)
    tokens = _pack_tokens(output, block_size, with_rope_lengths, sampled)
    query_lens = [num_new_tokens for _, num_new_tokens in output.scheduled]
    seq_lens = [request.num_computed_tokens + num_new_tokens for request, num_new_tokens in output.scheduled]
    cu_seqlens_q, seq_lens_tensor, block_tables = _pack_sequences(output, query_lens, seq_lens, block_size, device)
    num_tokens = sum(query_lens)
    num_rows = 2 if with_rope_lengths else 1
    wide = _to_device(np.array(tokens.packed(), dtype=np.int64), device)
    end_of_positions = num_tokens * (1 + num_rows)
    input_ids = wide[:num_tokens] if sampled is None else sampled.token_ids.index_select(0, wide[:num_tokens])
    return ForwardBatch(
        input_ids=input_ids.view(1, num_tokens),
        position_ids=wide[num_tokens:end_of_positions].view(num_rows, num_tokens),
        ragged=RaggedBatch(
            cu_seqlens_q=cu_seqlens_q,
            seq_lens=seq_lens_tensor,
            block_tables=block_tables,
            slot_mapping=wide[end_of_positions : end_of_positions + num_tokens],
            host_query_lens=query_lens,
            host_seq_lens=seq_lens,
            num_decodes=output.num_decodes,
        ),
        logits_indices=wide[end_of_positions + num_tokens :],
        requests_to_sample=tokens.requests_to_sample[:num_requests],
    )


@dataclass
class _PackedTokens:
    token_ids: list[int]  # or, of tokens that only the device knows, where it finds them
    positions: list[int]
    rope_lengths: list[int]
    slots: list[int]
    logits_indices: list[int]
    requests_to_sample: list[Request]

    def packed(self) -> list[int]:
        return self.token_ids + self.positions + self.rope_lengths + self.slots + self.logits_indices


def _pack_tokens(
    output: SchedulerOutput, block_size: int, with_rope_lengths: bool, sampled: SampledTokens | None
) -> _PackedTokens:
    tokens = _PackedTokens([], [], [], [], [], [])
    for request, num_new_tokens in output.scheduled:
        start = request.num_computed_tokens
        end = start + num_new_tokens
        tokens.token_ids += request.token_ids[start:end] if sampled is None else [sampled.rows[request]]
        tokens.positions += range(start, end)
        if with_rope_lengths:
            tokens.rope_lengths += request.rope_lengths(start, end)
        for block_idx in range(start // block_size, blocks_for(end, block_size)):
            first_position = block_idx * block_size
            shift = request.block_table[block_idx] * block_size - first_position
            tokens.slots += range(max(start, first_position) + shift, min(end, first_position + block_size) + shift)
        if end >= request.num_tokens:
            tokens.logits_indices.append(len(tokens.token_ids) - 1)
            tokens.requests_to_sample.append(request)
    return tokens


def _pack_sequences(
    output: SchedulerOutput, query_lens: list[int], seq_lens: list[int], block_size: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    num_seqs = len(seq_lens)
    max_blocks = blocks_for(max(seq_lens), block_size)
    packed = np.zeros(2 * num_seqs + 1 + num_seqs * max_blocks, dtype=np.int32)
    np.cumsum(query_lens, out=packed[1 : num_seqs + 1])
    packed[num_seqs + 1 : 2 * num_seqs + 1] = seq_lens
    tables = packed[2 * num_seqs + 1 :].reshape(num_seqs, max_blocks)
    for row, (request, _) in enumerate(output.scheduled):
        num_blocks = blocks_for(seq_lens[row], block_size)
        tables[row, :num_blocks] = np.frombuffer(request.block_table, dtype=np.int32, count=num_blocks)
    narrow = _to_device(packed, device)
    return (
        narrow[: num_seqs + 1],
        narrow[num_seqs + 1 : 2 * num_seqs + 1],
        narrow[2 * num_seqs + 1 :].view(num_seqs, max_blocks),
    )


def _to_device(packed: np.ndarray, device: torch.device) -> torch.Tensor:
    host = torch.from_numpy(packed)
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)
