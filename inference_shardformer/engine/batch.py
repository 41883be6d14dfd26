"""ForwardBatch: the tensors of one step, packed from the lists of its requests."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from inference_shardformer.attention.base import RaggedBatch
from inference_shardformer.engine.batch_frame import BatchFrame, FrameShape
from inference_shardformer.engine.request import DraftedRow, Request, SampledRow
from inference_shardformer.engine.scheduler import SchedulerOutput


class PromptRows(NamedTuple):
    """Rows of logits after tokens of a prompt: the first one foretells the token at `position`, and so on."""

    request: Request
    first_row: int
    num_rows: int
    position: int

    @property
    def token_ids(self) -> list[int]:
        """The tokens that the prompt goes on with, one for each row."""
        return self.request.token_ids[self.position : self.position + self.num_rows]


@dataclass(frozen=True)
class ForwardBatch:
    """Everything one forward pass reads.

    Its logits are one row for each of `rows` in their order, and between them those of `prompts`; rows of copies come
    last, if there are any. `rows` are `requests_to_sample`, each followed by its drafts.
    """

    input_ids: torch.Tensor  # int64 [1, num_tokens]
    position_ids: torch.Tensor  # int64 [1, num_tokens], or [2, num_tokens] where the second row holds rope lengths
    ragged: RaggedBatch
    logits_indices: torch.Tensor  # int64 [num_logits], packed tokens after which a token is sampled or scored
    requests_to_sample: list[Request]
    rows: list[SampledRow]
    prompts: list[PromptRows]

    @property
    def num_rows(self) -> int:
        """Rows of the logits that belong to somebody."""
        return len(self.rows) + sum(prompt.num_rows for prompt in self.prompts)

    @property
    def rows_to_sample(self) -> list[int]:
        """Which rows of the logits are those of `rows`."""
        places = set(range(self.num_rows))
        for prompt in self.prompts:
            places -= set(range(prompt.first_row, prompt.first_row + prompt.num_rows))
        return sorted(places)


class SampledTokens(NamedTuple):
    """Tokens that the device has sampled, or will have, and the host has not read: `rows[request]` is its own."""

    token_ids: torch.Tensor  # int64 [num_rows]
    rows: Mapping[Request, int]


class BatchBuilder:
    """Packs the scheduled steps of one engine.

    On a CPU the tensors of a batch are filled anew by the next one of the same shape.
    """

    def __init__(
        self, *, block_size: int, device: torch.device, with_rope_lengths: bool, padding: Callable[[int, int], int]
    ) -> None:
        """`padding` says how many copies of its last sequence a step of so many decodes and sequences gets."""
        self._block_size = block_size
        self._device = device
        self._fills_again = device.type == "cpu"
        self._with_rope_lengths = with_rope_lengths
        self._padding = padding
        self._frame: BatchFrame | None = None

    def __call__(self, output: SchedulerOutput, sampled: SampledTokens | None = None) -> ForwardBatch:
        """The tensors of a step, which may have copies of its last sequence behind the others.

        Copies have logits, and no request to sample. With `sampled`, every request runs the one token that it does not
        know yet, which the device takes from there; such a batch has tensors of its own.
        """
        num_padding = self.num_padding(output)
        tokens = _pack(output, self._block_size, self._with_rope_lengths, sampled)
        for _ in range(num_padding):
            tokens.repeat()
        query_lens = tokens.query_lens
        shape = FrameShape(
            num_tokens=len(tokens.token_ids),
            num_position_rows=2 if self._with_rope_lengths else 1,
            num_logits=len(tokens.logits_indices),
            num_seqs=len(query_lens),
            max_blocks=max(map(len, tokens.tables)),
        )
        frame = self._frame_of(shape, is_kept=sampled is None)
        frame.fill(tokens.packed(), query_lens, tokens.seq_lens, tokens.tables)
        input_ids = frame.input_ids
        if sampled is not None:
            input_ids = sampled.token_ids.index_select(0, input_ids[0]).unsqueeze(0)
        return ForwardBatch(
            input_ids=input_ids,
            position_ids=frame.position_ids,
            ragged=RaggedBatch(
                cu_seqlens_q=frame.cu_seqlens_q,
                seq_lens=frame.seq_lens,
                block_tables=frame.block_tables,
                slot_mapping=frame.slot_mapping,
                host_query_lens=query_lens,
                host_seq_lens=tokens.seq_lens,
                num_decodes=_num_decodes(output) + num_padding,
            ),
            logits_indices=frame.logits_indices,
            requests_to_sample=tokens.requests_to_sample,
            rows=tokens.rows,
            prompts=tokens.prompts,
        )

    def num_padding(self, output: SchedulerOutput) -> int:
        """How many copies of its last sequence a step gets at present."""
        num_decodes = _num_decodes(output)
        return self._padding(num_decodes, num_decodes + len(output.scheduled) - output.num_decode_tokens)

    def _frame_of(self, shape: FrameShape, *, is_kept: bool) -> BatchFrame:
        """Of that shape; the one that is kept where it may be filled again."""
        if not (self._fills_again and is_kept):
            return BatchFrame(shape, self._device)
        if self._frame is None or self._frame.shape != shape:
            self._frame = BatchFrame(shape, self._device)
        return self._frame


@dataclass
class _PackedTokens:
    token_ids: list[int]  # or, of tokens that only the device knows, where it finds them
    positions: list[int]
    rope_lengths: list[int]
    slots: list[int]
    logits_indices: list[int]
    query_lens: list[int]
    seq_lens: list[int]
    tables: list[array[int]]
    requests_to_sample: list[Request]
    rows: list[SampledRow]
    prompts: list[PromptRows]

    def packed(self) -> list[int]:
        return self.token_ids + self.positions + self.rope_lengths + self.slots + self.logits_indices

    def place(self, request: Request, start: int, end: int, block_size: int) -> None:
        """A sequence of tokens `[start, end)` of a request: where they stand, not what they are."""
        table = request.block_table[: -(-end // block_size)]
        self.query_lens.append(end - start)
        self.seq_lens.append(end)
        self.tables.append(table)
        self.positions += range(start, end)
        while start < end:  # block by block
            offset = start % block_size
            slot = table[start // block_size] * block_size + offset
            length = min(block_size - offset, end - start)
            self.slots += range(slot, slot + length)
            start += length

    def score_prompt(self, request: Request, start: int, end: int) -> None:
        """Have logits after the tokens of `[start, end)` that want them, before these are packed."""
        unscored = request.unscored_positions(start, end)
        if unscored:
            self.prompts.append(PromptRows(request, len(self.logits_indices), len(unscored), unscored.start + 1))
            first = len(self.token_ids) - start
            self.logits_indices += range(first + unscored.start, first + unscored.stop)

    def draft(self, request: Request, block_size: int) -> None:
        """A sequence of one token for each draft, behind the request's last token."""
        for place, token_id in enumerate(request.drafts):
            end = request.num_tokens + place
            self.place(request, end, end + 1, block_size)
            self.logits_indices.append(len(self.token_ids))
            self.token_ids.append(token_id)
            self.rows.append(DraftedRow(request, place + 1))

    def repeat(self) -> None:
        """The last sequence once more, which has one token; it writes what that one writes."""
        self.logits_indices.append(len(self.token_ids))
        for column in (self.token_ids, self.positions, self.rope_lengths, self.slots, self.query_lens, self.seq_lens):
            column += column[-1:]
        self.tables.append(self.tables[-1][:])


def _pack(
    output: SchedulerOutput, block_size: int, with_rope_lengths: bool, sampled: SampledTokens | None
) -> _PackedTokens:
    """Every request is a sequence of its new tokens, and one of each draft.

    Thus attention computes what follows a right draft exactly as it would have without drafts: the keys and values of
    all tokens are written before any are read.
    """
    tokens = _PackedTokens([], [], [], [], [], [], [], [], [], [], [])
    for request, num_new_tokens in output.scheduled:
        num_drafts = len(request.drafts)
        start, end = request.num_computed_tokens, request.num_computed_tokens + num_new_tokens - num_drafts
        tokens.place(request, start, end, block_size)
        if request.sampling.prompt_logprobs is not None:
            tokens.score_prompt(request, start, end)
        tokens.token_ids += request.token_ids[start:end] if sampled is None else [sampled.rows[request]]
        if with_rope_lengths:
            tokens.rope_lengths += request.rope_lengths(start, end + num_drafts)
        if end >= request.num_tokens:
            tokens.logits_indices.append(len(tokens.token_ids) - 1)
            tokens.requests_to_sample.append(request)
            tokens.rows.append(request)
        if request.drafts:
            tokens.draft(request, block_size)
    return tokens


def _num_decodes(output: SchedulerOutput) -> int:
    """Sequences of one token: decodes, and each draft."""
    return output.num_decode_tokens + output.num_draft_tokens
