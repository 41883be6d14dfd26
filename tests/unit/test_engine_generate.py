"""Whole generations through a paged cache, against an oracle without cache, batch or schedule."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inference_shardformer.engine.outputs import RequestOutput, StepStats
from inference_shardformer.engine.sampling_params import SamplingParams
from inference_shardformer.errors import RequestError

LETTERS = range(97, 123)


def _checked(setup: object, prompts: list, params: object, tiny: SimpleNamespace) -> list[RequestOutput]:
    """Generate with the integrity of blocks and queues checked after every step, and everything free at the end."""
    engine = setup.engine()
    outputs = engine.generate(prompts, params, on_step=lambda _: engine._core.scheduler.check_integrity())
    tiny.assert_all_free(engine)
    assert [output.index for output in outputs] == list(range(len(prompts)))
    return outputs


@pytest.mark.parametrize(
    "limits",
    [
        {"num_blocks": 512},
        {"num_blocks": 16, "length_dependent_rope": True},
        {"num_blocks": 14, "max_num_batched_tokens": 7, "length_dependent_rope": True},
        {"num_blocks": 60, "block_size": 1, "max_num_batched_tokens": 64},
        {"num_blocks": 60, "max_num_seqs": 3},
        {"num_blocks": 64, "max_num_batched_tokens": 1},
        {"num_blocks": 4, "block_size": 16, "max_num_batched_tokens": 13},
    ],
    ids=[
        "roomy",
        "small cache",
        "chunks in a small cache",
        "block of one",
        "few seats",
        "one token a step",
        "large blocks",
    ],
)
@pytest.mark.parametrize("num_prompts", [1, 7, 40])
def test_tokens_equal_the_oracle(tiny: SimpleNamespace, num_prompts: int, limits: dict) -> None:
    setup = tiny.Setup(**limits)
    prompts = tiny.ragged_prompts(num_prompts, seed=num_prompts)
    params = [SamplingParams(max_new_tokens=1 + i % 16) for i in range(num_prompts)]
    outputs = _checked(setup, prompts, params, tiny)
    for prompt, param, output in zip(prompts, params, outputs, strict=True):
        assert list(output.token_ids) == setup.greedy(prompt, param.max_new_tokens)
        assert output.prompt_token_ids == tuple(prompt)
        assert output.finish_reason == "length"
        assert output.usage.num_prompt_tokens == len(prompt)
        assert output.usage.num_generated_tokens == len(output.token_ids)
    preempted = sum(output.usage.num_preemptions for output in outputs)
    if num_prompts == 1 or limits["num_blocks"] == 512:
        assert preempted == 0
    elif num_prompts == 40 and limits["num_blocks"] in (14, 16):
        assert preempted > 0


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 12), st.integers(1, 8)), min_size=1, max_size=6),
    st.integers(1, 4),
    st.integers(0, 6),
    st.integers(1, 9),
    st.integers(1, 6),
)
def test_any_limits_give_the_tokens_of_the_oracle(
    tiny: SimpleNamespace, lengths: list[tuple[int, int]], block_size: int, spare: int, budget: int, seats: int
) -> None:
    needed = max(-(-(num_prompt + num_new - 1) // block_size) for num_prompt, num_new in lengths)
    setup = tiny.Setup(
        num_blocks=needed + spare, block_size=block_size, max_num_batched_tokens=budget, max_num_seqs=seats
    )
    prompts = [[i, *range(num_prompt - 1)] for i, (num_prompt, _) in enumerate(lengths)]
    outputs = _checked(setup, prompts, [SamplingParams(max_new_tokens=num_new) for _, num_new in lengths], tiny)
    for prompt, (_, num_new), output in zip(prompts, lengths, outputs, strict=True):
        assert list(output.token_ids) == setup.greedy(prompt, num_new)


def test_requests_share_a_step(tiny: SimpleNamespace) -> None:
    engine = tiny.Setup(num_blocks=128).engine()
    stats: list[StepStats] = []
    engine.generate(tiny.ragged_prompts(10), on_step=stats.append)
    assert len(stats) == 16
    assert stats[0].num_decode_tokens == 1  # the prompt of one token
    assert stats[0].num_prefill_tokens > 9
    assert stats[1].num_decode_tokens == 10
    assert stats[1].num_running == 10
    assert stats[1].num_free_blocks < 128
    assert stats[-1].num_running == stats[-1].num_waiting == 0
    assert all(step.seconds > 0 for step in stats)


def test_sampled_tokens_are_the_same_alone_in_company_and_after_preemption(tiny: SimpleNamespace) -> None:
    prompts = tiny.ragged_prompts(8)
    params = [SamplingParams(temperature=0.9, top_p=0.95, top_k=50, seed=i) for i in range(8)]
    alone = [tiny.Setup().engine().generate([p], s)[0] for p, s in zip(prompts, params, strict=True)]
    for limits in ({}, {"num_blocks": 14, "max_num_batched_tokens": 11}):
        outputs = _checked(tiny.Setup(**limits), prompts, params, tiny)
        assert [output.token_ids for output in outputs] == [output.token_ids for output in alone]
    assert sum(output.usage.num_preemptions for output in outputs) > 0
    other = tiny.Setup().engine().generate(prompts, SamplingParams(temperature=0.9, seed=99))
    assert all(a.token_ids != b.token_ids for a, b in zip(alone, other, strict=True))


def test_requests_without_a_seed_draw_from_that_of_the_configuration(tiny: SimpleNamespace) -> None:
    params = SamplingParams(temperature=1.0)
    prompts = [[1, 2], [1, 2]]
    first, again, other = (tiny.Setup(seed=seed).engine().generate(prompts, params) for seed in (3, 3, 4))
    tokens = [[output.token_ids for output in outputs] for outputs in (first, again, other)]
    assert tokens[0] == tokens[1]
    assert len({*tokens[0], *tokens[2]}) == 4  # equal prompts draw differently, and so do other configurations


def test_eos_ends_a_request_unless_ignored(tiny: SimpleNamespace) -> None:
    setup = tiny.Setup(alphabet=[97, 98, 99, tiny.EOS], max_new_tokens=30)
    prompts = tiny.ragged_prompts(8)
    outputs = _checked(setup, prompts, None, tiny)
    for prompt, output in zip(prompts, outputs, strict=True):
        assert list(output.token_ids) == setup.greedy(prompt, 30)
        assert output.finish_reason == "stop"
        assert output.stop_reason is None
        assert output.token_ids[-1] == tiny.EOS
        assert output.text == bytes(output.token_ids[:-1]).decode()
    ignoring = _checked(setup, prompts, SamplingParams(ignore_eos=True, skip_special_tokens=False), tiny)
    for prompt, output in zip(prompts, ignoring, strict=True):
        assert list(output.token_ids) == setup.greedy(prompt, 30, ends_at=())
        assert output.finish_reason == "length"
        assert "<special>" in output.text


def test_stop_token_ends_a_request_and_stays(tiny: SimpleNamespace) -> None:
    setup = tiny.Setup()
    wanted = setup.greedy([5, 6], 16)
    [output] = _checked(setup, [[5, 6]], SamplingParams(stop_token_ids=[wanted[9], wanted[4]]), tiny)
    assert list(output.token_ids) == wanted[:5]
    assert (output.finish_reason, output.stop_reason) == ("stop", wanted[4])


def test_stop_text_across_tokens_ends_the_text_before_it(tiny: SimpleNamespace) -> None:
    setup = tiny.Setup(alphabet=LETTERS)
    prompts = ["hello", "world"]
    whole = [bytes(setup.greedy(list(prompt.encode()), 16)).decode() for prompt in prompts]
    params = [SamplingParams(stop=text[5:9]) for text in whole]
    outputs = _checked(setup, prompts, params, tiny)
    for text, output in zip(whole, outputs, strict=True):
        assert output.text == text[:5]
        assert (output.finish_reason, output.stop_reason) == ("stop", text[5:9])
        assert len(output.token_ids) == 9
    near_miss = SamplingParams(stop=[whole[0][-3:] + "!"])
    assert _checked(setup, prompts[:1], near_miss, tiny)[0].text == whole[0]


def test_text_is_that_of_all_tokens(tiny: SimpleNamespace) -> None:
    for output in tiny.Setup().engine().generate(tiny.ragged_prompts(6)):
        assert output.text == bytes(output.token_ids).decode(errors="replace")
    assert tiny.Setup(tokenizer=None).engine().generate([[1]])[0].text == ""


def test_default_length_is_clamped_to_the_context(tiny: SimpleNamespace) -> None:
    [output] = tiny.Setup(max_model_len=20).engine().generate([[1] * 15])
    assert len(output.token_ids) == 5
    assert output.finish_reason == "length"


def test_logits_that_are_not_finite_end_that_request_alone(tiny: SimpleNamespace) -> None:
    setup = tiny.Setup(alphabet=LETTERS, poison=200)
    engine = setup.engine()
    prompts = [[1, 2], [3, 200], [4]]
    outputs = engine.generate(prompts, on_error="return")
    assert [output.finish_reason for output in outputs] == ["length", "abort", "length"]
    assert list(outputs[2].token_ids) == setup.greedy([4], 16)
    with pytest.raises(RequestError, match=r"prompts\[1\].*not finite"):
        engine.generate(prompts)
    with pytest.raises(RequestError, match="not finite"):
        list(engine.stream(prompts))
    tiny.assert_all_free(engine)


def test_failing_model_leaves_nothing_behind(tiny: SimpleNamespace) -> None:
    setup = tiny.Setup(fail_at=3)
    engine = setup.engine()
    engine.add_request([9, 9], request_id="other")
    with pytest.raises(RuntimeError, match="the model broke"):
        engine.generate(tiny.ragged_prompts(5))
    assert engine.num_unfinished == 1
    outputs = []
    while engine.has_unfinished():
        outputs += engine.step()
    assert [output.request_id for output in outputs] == ["other"]
    assert list(outputs[0].token_ids) == setup.greedy([9, 9], 16)
    tiny.assert_all_free(engine)


def test_on_step_may_interrupt(tiny: SimpleNamespace) -> None:
    engine = tiny.Setup().engine()

    def interrupt(stats: StepStats) -> None:
        if stats.num_decode_tokens:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate(tiny.ragged_prompts(5), on_step=interrupt)
    tiny.assert_all_free(engine)
