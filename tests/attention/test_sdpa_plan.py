"""How decoding sequences are grouped, and what the plan of backend sdpa gathers."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from inference_shardformer.attention.sdpa_plan import (
    LIMITS,
    group_by_length,
    plan_decodes,
    plan_prefills,
)
from inference_shardformer.conformance.cases import MIXED, RAGGED_DECODES, Case, named_batches
from inference_shardformer.conformance.problem import make_problem

BYTES_PER_TOKEN = 768
BATCHES = named_batches(16)
WINDOWED = Case((*RAGGED_DECODES, (0, 40), (20, 20)), window=16)


@given(st.lists(st.integers(1, 4000), min_size=1, max_size=60).map(sorted))
def test_groups_cover_everything_within_the_limits(lengths: list[int]) -> None:
    groups = group_by_length(lengths, bytes_per_token=BYTES_PER_TOKEN, limits=LIMITS["cpu"])
    assert [i for group in groups for i in range(group.start, group.stop)] == list(range(len(lengths)))
    for group in groups:
        members = lengths[group]
        padded = max(members) * len(members)
        assert len(members) == 1 or padded * BYTES_PER_TOKEN <= LIMITS["cpu"].size
        assert (padded - sum(members)) * BYTES_PER_TOKEN <= LIMITS["cpu"].padding


def test_short_sequences_share_a_group() -> None:
    assert group_by_length([64] * 32, bytes_per_token=BYTES_PER_TOKEN, limits=LIMITS["cpu"]) == [slice(0, 32)]


def test_one_long_sequence_does_not_pad_the_short_ones() -> None:
    assert group_by_length([64] * 31 + [1024], bytes_per_token=BYTES_PER_TOKEN, limits=LIMITS["cpu"]) == [
        slice(0, 31),
        slice(31, 32),
    ]


def test_equal_lengths_need_neither_mask_nor_order() -> None:
    problem = make_problem(Case(BATCHES["equal_decodes"]))
    plan = plan_decodes(problem.batch, problem.spec)
    assert plan.order is None
    assert [group.mask for group in plan.groups] == [None]


def test_a_window_bounds_what_a_decode_gathers() -> None:
    problem = make_problem(WINDOWED)
    plan = plan_decodes(problem.batch, problem.spec)
    assert max(group.num_keys for group in plan.groups) == 16


def test_a_window_bounds_what_a_chunk_gathers() -> None:
    problem = make_problem(WINDOWED)
    chunk = plan_prefills(problem.batch, problem.spec)[-1]
    assert len(chunk.slots) == 20 + 16 - 1  # the chunk's own tokens, and what its first query sees before itself


def test_a_whole_prompt_needs_no_mask_and_a_chunk_does() -> None:
    problem = make_problem(Case(MIXED))
    calls = plan_prefills(problem.batch, problem.spec)
    assert [call.mask is None for call in calls] == [True, False, True, False]


def test_a_batch_without_decodes_has_no_decode_plan() -> None:
    problem = make_problem(Case(BATCHES["ragged_prompts"]))
    assert plan_decodes(problem.batch, problem.spec) is None
