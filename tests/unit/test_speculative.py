"""Guessed tokens: what is guessed, and that nothing but the number of steps depends on it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inference_shardformer.config.inference import SamplingDefaults, SchedulerConfig
from inference_shardformer.engine.outputs import StepStats
from inference_shardformer.engine.request import Request
from inference_shardformer.engine.sampling_params import SamplingParams
from inference_shardformer.engine.scheduler import Scheduler
from inference_shardformer.engine.speculative import PromptLookup, num_accepted
from inference_shardformer.kv_cache.block_allocator import BlockAllocator

LOOKUP = {"speculation": "prompt_lookup", "alphabet": [97, 98]}  # half of all guesses are right


def _best_place(tokens: list[int]) -> tuple[int, int]:
    """By looking everywhere: what the best of the last eight places has in common with the end, and where it is."""

    def in_common(place: int) -> int:
        length = 0
        while length < min(place, 32) and tokens[place - 1 - length] == tokens[-1 - length]:
            length += 1
        return length

    latest = [place for place in range(2, len(tokens)) if in_common(place) >= 2][-8:]
    return max(((in_common(place), place) for place in latest), default=(0, 0))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(0, 12), st.data())
def test_drafts_are_what_followed_the_longest_common_text(tokens: list[int], most: int, data: st.DataObject) -> None:
    known = tokens[:1]
    lookup = PromptLookup(known)
    while len(known) < len(tokens):  # it grows in pieces
        known += tokens[len(known) : len(known) + data.draw(st.integers(1, 5))]
        if data.draw(st.booleans()):
            lookup.propose(0)
    drafts = lookup.propose(most)
    num_in_common, place = _best_place(tokens)
    assert len(drafts) == min(most, num_in_common, 4)
    again = tokens + drafts
    assert all(again[place + i] == draft for i, draft in enumerate(drafts))


def test_right_drafts_make_longer_ones_and_wrong_ones_pauses() -> None:
    lookup = PromptLookup([1, 2, 3] * 9)
    lengths = []
    for _ in range(4):
        lengths.append(len(lookup.propose(20)))
        lookup.settle(lengths[-1], lengths[-1])
    assert lengths == [4, 8, 16, 20]
    lookup.settle(20, 6)
    assert len(lookup.propose(20)) == 7
    waits = []
    for _ in range(7):
        lookup.settle(1, 0)
        waits.append(next(i for i in range(99) if lookup.propose(20)))
    assert waits == [1, 2, 4, 8, 16, 32, 32]
    lookup.settle(1, 1)
    assert len(lookup.propose(20)) == 2
    lookup.settle(2, 0)
    assert [len(lookup.propose(20)) for _ in range(17)] == [0] * 16 + [1]


@pytest.mark.parametrize(
    ("drafts", "chosen", "expected"),
    [([], [5], 0), ([5], [5, 6], 1), ([5, 6], [5, 7, 8], 1), ([5, 6], [4, 6, 8], 0), ([5, 6], [5, -1, 8], 1)],
)
def test_accepted_are_the_leading_drafts_that_were_chosen(drafts: list, chosen: list, expected: int) -> None:
    assert num_accepted(drafts, chosen) == expected


@pytest.mark.parametrize(
    "limits",
    [
        {"num_blocks": 512},
        {"num_blocks": 16, "length_dependent_rope": True},
        {"num_blocks": 14, "max_num_batched_tokens": 7, "length_dependent_rope": True},
        {"num_blocks": 60, "block_size": 1, "max_num_batched_tokens": 64},
        {"num_blocks": 60, "max_num_seqs": 3},
        {"num_blocks": 64, "max_num_batched_tokens": 1},
        {"num_blocks": 20, "prefix_caching": "on", "length_dependent_rope": True},
    ],
    ids=["roomy", "small cache", "chunks in a small cache", "block of one", "few seats", "one token a step", "shared"],
)
@pytest.mark.parametrize(
    "sampling",
    [
        {"logprobs": 1, "prompt_logprobs": 1},
        {"temperature": 0.9, "min_new_tokens": 1, "min_p": 0.1},
        {"repetition_penalty": 1.3, "frequency_penalty": 0.2, "temperature": 0.5, "logit_bias": {97: 0.5}},
    ],
    ids=["greedy", "drawn", "with wishes"],
)
def test_tokens_are_those_without_guesses(tiny: SimpleNamespace, limits: dict, sampling: dict) -> None:
    prompts = [[97 + token % 2 for token in prompt] for prompt in tiny.ragged_prompts(12)]
    params = [SamplingParams(max_new_tokens=1 + i % 5 * 6, seed=i, **sampling) for i in range(len(prompts))]
    expected = tiny.Setup(alphabet=[97, 98], length_dependent_rope=limits.get("length_dependent_rope", False))
    without = expected.engine().generate(prompts, params)
    engine = tiny.Setup(**LOOKUP, **limits).engine()
    stats: list[StepStats] = []

    def check(step: StepStats) -> None:
        engine._core.scheduler.check_integrity()
        stats.append(step)

    outputs = engine.generate(prompts, params, on_step=check)
    tiny.assert_all_free(engine)
    assert [output.token_ids for output in outputs] == [output.token_ids for output in without]
    assert [output.text for output in outputs] == [output.text for output in without]
    assert [output.logprobs for output in outputs] == [output.logprobs for output in without]
    assert [output.prompt_logprobs for output in outputs] == [output.prompt_logprobs for output in without]
    num_drafts = sum(output.usage.num_draft_tokens for output in outputs)
    num_right = sum(output.usage.num_accepted_draft_tokens for output in outputs)
    assert num_drafts == sum(step.num_draft_tokens for step in stats)
    if limits.get("max_num_batched_tokens") == 1:
        assert num_drafts == 0
    else:
        assert 0 < num_right < num_drafts
    budget = limits.get("max_num_batched_tokens", 256)
    assert all(step.num_prefill_tokens + step.num_decode_tokens + step.num_draft_tokens <= budget for step in stats)


def test_fewer_steps_where_text_repeats_itself(tiny: SimpleNamespace) -> None:
    steps: list[StepStats] = []
    engine = tiny.Setup(speculation="prompt_lookup", alphabet=[97], max_new_tokens=40).engine()
    (output,) = engine.generate([[97] * 5], on_step=steps.append)
    assert output.token_ids == (97,) * 40
    assert [step.num_draft_tokens for step in steps] == [0, 4, 8, 8, 8, 6]
    assert [step.num_decode_tokens for step in steps] == [0, 1, 1, 1, 1, 1]
    assert (output.usage.num_draft_tokens, output.usage.num_accepted_draft_tokens) == (34, 34)


@pytest.mark.parametrize("stop", [{"stop": ["ba"]}, {"stop_token_ids": [98]}, {"stop": ["bb", "aab"]}])
def test_ends_within_right_drafts(tiny: SimpleNamespace, stop: dict) -> None:
    prompts = [[97, 98] * 6, [98, 97, 97] * 4, [97] * 9]
    params = [SamplingParams(max_new_tokens=30, temperature=0.8, seed=seed, **stop) for seed in range(3)]
    without = tiny.Setup(alphabet=[97, 98]).engine().generate(prompts, params)
    engine = tiny.Setup(**LOOKUP).engine()
    outputs = engine.generate(prompts, params)
    for output, expected in zip(outputs, without, strict=True):
        assert (output.token_ids, output.text) == (expected.token_ids, expected.text)
        assert (output.finish_reason, output.stop_reason) == (expected.finish_reason, expected.stop_reason)
    assert any(output.finish_reason == "stop" for output in outputs)
    tiny.assert_all_free(engine)


def test_streams_hand_out_several_tokens_of_a_step_at_once(tiny: SimpleNamespace) -> None:
    engine = tiny.Setup(speculation="prompt_lookup", alphabet=[97], max_new_tokens=20).engine()
    chunks = list(engine.stream([[97] * 5]))
    assert [len(chunk.token_ids) for chunk in chunks] == [1, 5, 9, 5]
    assert [chunk.text for chunk in chunks] == ["a" * len(chunk.token_ids) for chunk in chunks]
    assert chunks[-1].finish_reason == "length"


def test_logits_that_are_not_finite_end_a_request_where_they_do_without_guesses(tiny: SimpleNamespace) -> None:
    prompts = [[97] * 5, [97, 98, 97, 98, 97]]
    broken = [tiny.Setup(alphabet=[97, 98], poison=98, speculation=way) for way in ("off", "prompt_lookup")]
    first, second = (
        setup.engine().generate(prompts, SamplingParams(max_new_tokens=12), on_error="return") for setup in broken
    )
    for without, output in zip(first, second, strict=True):
        assert output.token_ids == without.token_ids
        assert str(output.error) == str(without.error)


def test_it_is_switched_on_and_off_between_steps(tiny: SimpleNamespace) -> None:
    engine = tiny.Setup(alphabet=[97], max_new_tokens=30).engine()
    engine.add_request([97] * 5)
    drafted = []

    def step() -> None:
        num_before = sum(drafted)
        engine.step()
        drafted.append(engine._core.live["request-0"].request.num_draft_tokens - num_before)

    engine.step()
    step()
    engine.update_config({"scheduler.speculation": "prompt_lookup", "scheduler.max_draft_tokens": 3})
    step()
    step()
    engine.update_config({"scheduler.speculation": "off"})
    step()
    assert drafted == [0, 3, 3, 0]


def test_ranks_guess_alike(tiny: SimpleNamespace) -> None:
    prompts = [[97 + token % 2 for token in prompt] for prompt in tiny.ragged_prompts(6)]
    params = [SamplingParams(max_new_tokens=24, temperature=0.7 * (i % 2), seed=i) for i in range(6)]
    expected = [output.token_ids for output in tiny.Setup(alphabet=[97, 98]).engine().generate(prompts, params)]

    def program(group: object) -> list:
        engine = tiny.Setup(**LOOKUP).engine(group, tiny.NullGuard())
        return [output.token_ids for output in engine.generate(prompts, params)]

    assert tiny.run_ranks(2, program) == [expected, expected]


@pytest.mark.parametrize("num_prompt_tokens", [4, 5, 9])
def test_drafts_end_where_the_rope_changes(num_prompt_tokens: int) -> None:
    """No draft is computed with the frequencies of the shorter length beyond it, nor are those behind it kept."""
    switch, limits = 8, SchedulerConfig(speculation="prompt_lookup", max_draft_tokens=5)
    sampling = SamplingParams(max_new_tokens=20).resolve(SamplingDefaults())
    request = Request("r", [0] * num_prompt_tokens, sampling, rope_switch_length=switch)
    scheduler = Scheduler(BlockAllocator(16), block_size=4)
    scheduler.add(request)
    seen = []
    while request.num_output_tokens < 12:
        ((_, num_new_tokens),) = scheduler.schedule(limits).scheduled
        end = request.num_computed_tokens + num_new_tokens
        seen += [(end, length) for length in request.rope_lengths(request.num_computed_tokens, end)]
        num_drafts = len(request.drafts)
        request.num_computed_tokens += num_new_tokens - num_drafts
        for place in range(request.verify([0] * (num_drafts + 1))):
            request.num_computed_tokens += place > 0
            request.append(0)
    assert all((length == switch + 1) == (end > switch) for end, length in seen)
    assert request.num_accepted_draft_tokens > 0
