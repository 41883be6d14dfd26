"""Log-probabilities of prompts: in chunks, over preemption, in company, on every rank, and only once."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest

from inference_shardformer.engine import scheduler
from inference_shardformer.engine.outputs import RequestOutput
from inference_shardformer.engine.sampling_params import SamplingParams
from inference_shardformer.engine.scorer import Scorer
from inference_shardformer.errors import RequestError

BYTES = range(256)
MIXED = [
    {"prompt_logprobs": 2},
    {},
    {"prompt_logprobs": 0, "temperature": 0.9, "seed": 4, "logprobs": 1},
    {"logprobs": 3},
    {"prompt_logprobs": 4, "repetition_penalty": 1.5},
]


def _params(num_prompts: int) -> list[SamplingParams]:
    return [SamplingParams(**MIXED[i % len(MIXED)]) for i in range(num_prompts)]


def _assert_true(tiny: SimpleNamespace, output: RequestOutput, num_top: int | None) -> None:
    """Against the log-softmax of what the model says about each beginning of the prompt."""
    if num_top is None:
        assert output.prompt_logprobs is None
        return
    assert output.prompt_logprobs is not None
    first, *found = output.prompt_logprobs
    assert first is None
    assert len(found) == len(output.prompt_token_ids) - 1
    for place, each in enumerate(found, start=1):
        context, token_id = output.prompt_token_ids[:place], output.prompt_token_ids[place]
        expected = tiny.next_logits(context, [0] * place, BYTES).double().log_softmax(dim=-1)
        order = expected.argsort(descending=True).tolist()
        assert (each.chosen.token_id, each.chosen.rank) == (token_id, order.index(token_id) + 1)
        assert [likely.token_id for likely in each.top] == order[:num_top]
        for likely in (each.chosen, *each.top):
            assert likely.logprob == pytest.approx(expected[likely.token_id].item(), abs=1e-5)


@pytest.mark.parametrize("overlap", ["off", "on"])
@pytest.mark.parametrize("most", [1, 3, 256])
@pytest.mark.parametrize("limits", [{}, {"num_blocks": 16, "max_num_batched_tokens": 7}], ids=["roomy", "tight"])
def test_every_token_but_the_first_has_that_of_the_model(
    tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, limits: dict, most: int, overlap: str
) -> None:
    monkeypatch.setattr(scheduler, "MAX_SCORED_TOKENS", most)
    prompts, params = tiny.ragged_prompts(10, longest=20), _params(10)
    plain = [SamplingParams(**{**MIXED[i % len(MIXED)], "prompt_logprobs": None}) for i in range(10)]
    engine = tiny.Setup(overlap=overlap, **limits).engine()
    outputs = engine.generate(prompts, params)
    if limits and most == 256:
        assert sum(output.usage.num_preemptions for output in outputs) > 0
    for output, param in zip(outputs, params, strict=True):
        _assert_true(tiny, output, param.prompt_logprobs)
    unscored = tiny.Setup().engine().generate(prompts, plain)
    for output, other in zip(outputs, unscored, strict=True):
        assert (output.token_ids, output.logprobs) == (other.token_ids, other.logprobs)
    tiny.assert_all_free(engine)


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_say_what_one_says(tiny: SimpleNamespace, size: int) -> None:
    prompts, params = tiny.ragged_prompts(7, longest=20), _params(7)

    def program(group: object) -> list[RequestOutput]:
        return tiny.Setup(max_num_batched_tokens=11).engine(group, tiny.NullGuard()).generate(prompts, params)

    results = tiny.run_ranks(size, program)
    assert results == [results[0]] * size
    for output, param in zip(results[0], params, strict=True):
        _assert_true(tiny, output, param.prompt_logprobs)


def test_a_step_has_no_more_rows_than_it_may(tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "MAX_SCORED_TOKENS", 5)
    score, sizes = Scorer.score_on_device, []

    def counted(self: Scorer, logits: object, rows: list[int], *more: object) -> object:
        sizes.append(len(rows))
        return score(self, logits, rows, *more)

    monkeypatch.setattr(Scorer, "score_on_device", counted)
    prompts = tiny.ragged_prompts(12, longest=30)
    tiny.Setup(num_blocks=200).engine().generate(prompts, SamplingParams(prompt_logprobs=1))
    assert sum(sizes) == sum(len(prompt) - 1 for prompt in prompts)
    assert max(sizes) == 5


def test_whoever_is_preempted_is_not_scored_again(tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    score, sizes = Scorer.score_on_device, []

    def counted(self: Scorer, logits: object, rows: list[int], *more: object) -> object:
        sizes.append(len(rows))
        return score(self, logits, rows, *more)

    monkeypatch.setattr(Scorer, "score_on_device", counted)
    prompts = tiny.ragged_prompts(9, longest=20)
    engine = tiny.Setup(num_blocks=14).engine()
    outputs = engine.generate(prompts, SamplingParams(prompt_logprobs=1))
    assert sum(output.usage.num_preemptions for output in outputs) > 0
    assert sum(sizes) == sum(len(prompt) - 1 for prompt in prompts)


def test_a_prompt_that_ran_before_is_scored_all_the_same(tiny: SimpleNamespace) -> None:
    engine = tiny.Setup().engine()
    prompts = tiny.ragged_prompts(5)
    engine.generate(prompts)
    for _ in range(2):
        for output in engine.generate(prompts, SamplingParams(prompt_logprobs=2)):
            _assert_true(tiny, output, 2)


def test_an_aborted_prompt_keeps_what_it_had(tiny: SimpleNamespace) -> None:
    engine = tiny.Setup(max_num_batched_tokens=4).engine()
    prompt = [random.Random(1).randrange(256) for _ in range(20)]
    engine.add_request(prompt, SamplingParams(prompt_logprobs=1), request_id="gone")
    engine.step()
    engine.step()
    engine.abort("gone")
    [output] = engine.step()
    assert len(output.prompt_logprobs) == 9  # eight tokens ran, and each told of the next one
    assert output.token_ids == ()


def test_bad_numbers_are_refused(tiny: SimpleNamespace) -> None:
    with pytest.raises(RequestError, match="prompt_logprobs=-1 must be an integer"):
        SamplingParams(prompt_logprobs=-1)
    setup = tiny.Setup()
    facts = setup.facts()
    setup.facts = lambda: type(facts)(**{**vars(facts), "vocab_size": 100})
    with pytest.raises(RequestError, match="prompt_logprobs=101 are more tokens than there are"):
        setup.engine().generate([[1]], SamplingParams(prompt_logprobs=101))


def test_blocks_that_others_computed_are_no_excuse_for_a_prompt_that_is_to_be_scored(tiny: SimpleNamespace) -> None:
    prompt = list(range(97, 117))
    wanted = SamplingParams(max_new_tokens=2, prompt_logprobs=1)
    (alone,) = tiny.Setup().engine().generate([prompt], wanted)
    engine = tiny.Setup(prefix_caching="on").engine()
    for params, num_cached in ((SamplingParams(max_new_tokens=2), 0), (wanted, 0), (SamplingParams(), 16)):
        (output,) = engine.generate([prompt], params)
        assert output.usage.num_cached_tokens == num_cached
        assert output.prompt_logprobs == (None if params is not wanted else alone.prompt_logprobs)
    assert len(alone.prompt_logprobs) == len(prompt)
