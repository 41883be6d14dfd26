"""The tensors of a batch: filled again where that is safe, and made anew where it is not."""

from __future__ import annotations

from itertools import pairwise

import torch

from inference_shardformer.engine.batch import BatchBuilder, SampledTokens
from inference_shardformer.engine.request import Request
from inference_shardformer.engine.sampling_params import SamplingParams
from inference_shardformer.engine.scheduler import ScheduledRequest, SchedulerOutput


def _builder(with_rope_lengths: bool = False, num_padding: int = 0) -> BatchBuilder:
    return BatchBuilder(
        block_size=4,
        device=torch.device("cpu"),
        with_rope_lengths=with_rope_lengths,
        padding=lambda num_decodes, num_seqs: num_padding,
    )


def _decoding(name: str, num_tokens: int, blocks: list[int]) -> Request:
    """A request that has computed all its tokens but the last."""
    from inference_shardformer.config.inference import SamplingDefaults

    request = Request(name, list(range(100, 100 + num_tokens)), SamplingParams().resolve(SamplingDefaults()))
    request.num_computed_tokens = num_tokens - 1
    request.block_table.extend(blocks)
    return request


def _output(*requests: Request) -> SchedulerOutput:
    scheduled = [ScheduledRequest(request, request.num_uncomputed_tokens) for request in requests]
    return SchedulerOutput(scheduled, sum(num == 1 for _, num in scheduled))


def _move_on(*requests: Request) -> None:
    for request in requests:
        request.num_computed_tokens = request.num_tokens
        request.append(7)


def test_a_batch_says_where_everything_is() -> None:
    first, second = _decoding("a", 6, [9, 3]), _decoding("b", 3, [5, 8])  # the second one has a block to spare
    second.num_computed_tokens = 0
    batch = _builder()(_output(first, second))
    assert batch.input_ids.tolist() == [[105, 100, 101, 102]]
    assert batch.position_ids.tolist() == [[5, 0, 1, 2]]
    assert batch.ragged.slot_mapping.tolist() == [13, 20, 21, 22]
    assert batch.logits_indices.tolist() == [0, 3]
    assert batch.ragged.cu_seqlens_q.tolist() == [0, 1, 4]
    assert batch.ragged.seq_lens.tolist() == list(batch.ragged.host_seq_lens) == [6, 3]
    assert batch.ragged.block_tables.tolist() == [[9, 3], [5, 0]]
    assert (batch.ragged.cu_seqlens_q.dtype, batch.ragged.slot_mapping.dtype) == (torch.int32, torch.int64)


def test_a_batch_of_the_same_shape_takes_over_the_tensors_and_none_of_their_contents() -> None:
    build, fresh = _builder(with_rope_lengths=True), _builder(with_rope_lengths=True)
    one, other, third = _decoding("a", 9, [1, 2, 3]), _decoding("b", 5, [4, 5]), _decoding("c", 9, [8, 7, 6])
    addresses = []
    for requests in ((one, other), (one, other), (other, third), (third, one)):
        batch, expected = build(_output(*requests)), fresh(_output(*requests))
        fresh._frame = None
        for name in ("input_ids", "position_ids", "logits_indices"):
            assert torch.equal(getattr(batch, name), getattr(expected, name)), name
        for name in ("cu_seqlens_q", "seq_lens", "block_tables", "slot_mapping"):
            assert torch.equal(getattr(batch.ragged, name), getattr(expected.ragged, name)), name
        addresses.append(batch.ragged.block_tables.data_ptr())
        _move_on(*requests)
    assert len(set(addresses)) == 1


def test_a_batch_of_another_shape_leaves_the_former_one_alone() -> None:
    build = _builder()
    one, other = _decoding("a", 4, [1, 2]), _decoding("b", 3, [4])
    batches = [build(_output(one)), build(_output(one, other))]
    _move_on(one)
    batches.append(build(_output(one)))  # which now needs a second block
    assert batches[0].ragged.block_tables.tolist() == [[1]]
    assert all(mine.ragged.seq_lens is not its.ragged.seq_lens for mine, its in pairwise(batches))


def test_a_batch_built_ahead_has_tensors_of_its_own() -> None:
    build, request = _builder(), _decoding("a", 3, [1, 2])
    present = build(_output(request))
    request.num_computed_tokens += 1
    ahead = build(
        SchedulerOutput([ScheduledRequest(request, 1)], 1), SampledTokens(torch.tensor([41, 42]), {request: 1})
    )
    assert ahead.input_ids.tolist() == [[42]]
    assert (present.position_ids.item(), ahead.position_ids.item()) == (2, 3)


def test_copies_of_the_last_sequence_have_logits_and_no_request() -> None:
    requests = [_decoding("a", 3, [1]), _decoding("b", 2, [2])]
    batch = _builder(num_padding=2)(_output(*requests))
    assert batch.input_ids.tolist() == [[102, 101, 101, 101]]
    assert batch.ragged.num_decodes == 4
    assert len(batch.logits_indices) == 4
    assert batch.requests_to_sample == requests
