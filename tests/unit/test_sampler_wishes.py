"""Presence and frequency penalties, biases, min_p and early ends, against Hugging Face and plain counting."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from inference_shardformer.config.inference import SamplingDefaults
from inference_shardformer.distributed.tensor_parallel import TensorParallelGroup
from inference_shardformer.engine.distribution import draw, drop_unlikely, probabilities, uniform
from inference_shardformer.engine.request import Request
from inference_shardformer.engine.sampler import NOT_FINITE, NOTHING_LEFT, Sampler
from inference_shardformer.engine.sampling_params import SamplingParams
from inference_shardformer.errors import RequestError

VOCAB_SIZE = 31
EOS = (30, 2)
LETTERS = range(97, 123)
SINGLE = TensorParallelGroup.single(torch.device("cpu"))
SETTINGS = [
    {},
    {"presence_penalty": 1.7},
    {"presence_penalty": -2.0},
    {"frequency_penalty": 2.0},
    {"frequency_penalty": -0.8, "presence_penalty": 0.3},
    {"logit_bias": {3: 20.0, 7: -1.5}},
    {"min_new_tokens": 9, "stop_token_ids": [5]},
    {"min_new_tokens": 9, "ignore_eos": True},
    {"repetition_penalty": 1.8, "presence_penalty": 1.0, "frequency_penalty": 0.5, "logit_bias": {1: 3.0, 0: -3.0}},
    {"min_p": 0.3, "temperature": 1.5, "seed": 1},
    {"min_p": 1.0, "temperature": 0.8, "seed": 2},
    {"min_p": 0.05, "temperature": 2.0, "top_k": 6, "top_p": 0.7, "seed": 3, "frequency_penalty": 1.0},
    {"temperature": 1.0, "seed": 4, "logit_bias": {9: 6.0}, "min_new_tokens": 12},
]


def _request(prompt: list[int], output: list[int], **given: object) -> Request:
    request = Request("r", prompt, SamplingParams(**given).resolve(SamplingDefaults()))
    request.token_ids += output
    return request


def _logits(num_rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_rows, VOCAB_SIZE, generator=torch.Generator().manual_seed(seed)) * 3


def _expected_scores(row: torch.Tensor, request: Request) -> torch.Tensor:
    """What Hugging Face's processors make of the logits, and counting where it has none."""
    sampling, ids, scores = request.sampling, torch.tensor([request.token_ids]), row.clone().unsqueeze(0)
    if sampling.logit_bias:
        scores = SequenceBiasLogitsProcessor({(token_id,): bias for token_id, bias in sampling.logit_bias})(ids, scores)
    if sampling.repetition_penalty != 1.0:
        scores = RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)(ids, scores)
    for token_id, count in Counter(request.output_token_ids).items():
        scores[0, token_id] -= sampling.presence_penalty + sampling.frequency_penalty * count
    ending = [*sampling.stop_token_ids, *(() if sampling.ignore_eos else EOS)]
    if sampling.min_new_tokens and ending:
        length, least = request.num_prompt_tokens, sampling.min_new_tokens
        scores = MinNewTokensLengthLogitsProcessor(length, least, ending)(ids, scores)
    return scores[0]


def _expected(row: torch.Tensor, request: Request) -> int:
    sampling, scores = request.sampling, _expected_scores(row, request).unsqueeze(0)
    if sampling.is_greedy:
        return int(scores.argmax())
    scores = TemperatureLogitsWarper(sampling.temperature)(None, scores)
    if sampling.min_p:
        scores = MinPLogitsWarper(sampling.min_p)(None, scores)
    if sampling.top_k:
        scores = TopKLogitsWarper(sampling.top_k)(None, scores)
    if sampling.top_p < 1.0:
        scores = TopPLogitsWarper(sampling.top_p)(None, scores)
    return int(draw(scores.softmax(dim=-1), [uniform(sampling.seed, request.num_output_tokens)]))


def _mixed() -> list[Request]:
    outputs = [[4, 4, 1, 4, 2], [], [3, 30, 3], [1, 0, 5, 5, 5, 5, 5, 5, 5]]
    return [_request([4, 6, 4], output, **given) for given in SETTINGS for output in outputs]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_choice_is_that_of_the_oracle_in_company_and_on_any_number_of_ranks(tiny: SimpleNamespace, size: int) -> None:
    requests = _mixed()
    logits = _logits(len(requests), seed=6)
    logits[0, 3] = torch.nan
    logits[5, 3] = torch.inf
    before = logits.clone()
    width = -(-VOCAB_SIZE // size)

    def program(group: object) -> list[int]:
        start, end = group.rank * width, min(VOCAB_SIZE, (group.rank + 1) * width)
        local = torch.full((len(requests), width + 1), 1000.0)
        local[:, : end - start] = logits[:, start:end]
        return Sampler(group, (start, end), eos_token_ids=EOS).sample(local, requests)

    chosen = tiny.run_ranks(size, program)
    assert chosen == [chosen[0]] * size
    expected = [_expected(row, request) for row, request in zip(logits, requests, strict=True)]
    expected[0] = expected[5] = NOT_FINITE
    assert chosen[0] == expected
    assert torch.equal(logits.nan_to_num(), before.nan_to_num())  # the model's logits stay as they are
    plain = Sampler(SINGLE, (0, VOCAB_SIZE)).sample(logits, [_request([1], [])] * len(requests))
    assert sum(mine != its for mine, its in zip(plain, chosen[0], strict=True)) > len(requests) // 4


@settings(max_examples=100, deadline=None)
@given(
    output=st.lists(st.integers(0, 4), max_size=12),
    prompt=st.lists(st.integers(0, 8), min_size=1, max_size=5),
    presence=st.sampled_from([0.0, -2.0, 0.5, 2.0]),
    frequency=st.sampled_from([0.0, -1.0, 0.25, 2.0]),
    bias=st.dictionaries(st.integers(0, VOCAB_SIZE - 1), st.floats(-100, 100, width=32), max_size=4),
    least=st.integers(0, 12),
    seed=st.integers(0, 99),
)
def test_greedy_choice_under_any_wishes(
    output: list[int], prompt: list[int], presence: float, frequency: float, bias: dict, least: int, seed: int
) -> None:
    penalties = {"presence_penalty": presence, "frequency_penalty": frequency}
    request = _request(prompt, output, logit_bias=bias, min_new_tokens=least, **penalties)
    logits = _logits(1, seed)
    [chosen] = Sampler(SINGLE, (0, VOCAB_SIZE), eos_token_ids=EOS).sample(logits, [request])
    assert chosen == _expected(logits[0], request)


@pytest.mark.parametrize("min_p", [1e-6, 0.02, 0.5, 1.0])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_min_p_keeps_what_hugging_face_keeps(min_p: float, temperature: float) -> None:
    logits = _logits(50, seed=2)
    logits[7, :] = 1.0  # all are the likeliest
    expected = MinPLogitsWarper(min_p)(None, TemperatureLogitsWarper(temperature)(None, logits)).softmax(dim=-1)
    drop_unlikely(logits, [temperature] * 50, [min_p] * 50)
    found = probabilities(logits, [temperature] * 50, [0] * 50, [1.0] * 50)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert torch.equal(found == 0, expected == 0)


def test_a_bias_moves_the_probability_by_its_exponential() -> None:
    requests = [_request([1], [], temperature=1.0, seed=i, logit_bias={3: 1.0}) for i in range(4000)]
    chosen = Sampler(SINGLE, (0, 2)).sample(
        torch.zeros(1, 2), [_request([1], [], temperature=1.0, logit_bias={1: 100})]
    )
    assert chosen == [1]
    drawn = Sampler(SINGLE, (0, 4)).sample(torch.zeros(4000, 4), requests)
    share = torch.e / (3 + torch.e)
    assert abs(drawn.count(3) / 4000 - share) < 5 * (share * (1 - share) / 4000) ** 0.5


@pytest.mark.parametrize(
    "limits", [{"num_blocks": 200}, {"num_blocks": 14, "max_num_batched_tokens": 11}], ids=["roomy", "preempted"]
)
def test_generation_is_the_same_alone_in_company_and_after_preemption(tiny: SimpleNamespace, limits: dict) -> None:
    prompts = tiny.ragged_prompts(len(SETTINGS))
    params = [SamplingParams(**{"seed": i, **given}) for i, given in enumerate(SETTINGS)]
    setup = tiny.Setup(alphabet=range(97, 123), **limits)
    alone = [setup.engine().generate([p], s)[0].token_ids for p, s in zip(prompts, params, strict=True)]
    engine = setup.engine()
    outputs = engine.generate(prompts, params)
    assert [output.token_ids for output in outputs] == alone
    assert (sum(output.usage.num_preemptions for output in outputs) > 0) == ("max_num_batched_tokens" in limits)
    tiny.assert_all_free(engine)


def test_no_end_before_its_time(tiny: SimpleNamespace) -> None:
    setup = tiny.Setup(alphabet=[97, 98, tiny.EOS], max_new_tokens=40)
    prompts = [[token] for token in range(60, 80)]
    early = setup.engine().generate(prompts)
    late = setup.engine().generate(prompts, SamplingParams(min_new_tokens=12))
    assert any(len(output.token_ids) < 12 for output in early)
    assert all(len(output.token_ids) > 12 for output in late)
    assert all(tiny.EOS not in output.token_ids[:12] for output in late)
    assert any(output.finish_reason == "stop" for output in late)
    [output] = setup.engine().generate(
        [[60]], SamplingParams(min_new_tokens=5, stop_token_ids=[97, 98], ignore_eos=True)
    )
    assert set(output.token_ids[:5]) == {tiny.EOS}


@pytest.mark.parametrize("is_streamed", [False, True])
def test_stop_text_in_the_first_tokens_is_passed_over(tiny: SimpleNamespace, is_streamed: bool) -> None:
    setup = tiny.Setup(alphabet=LETTERS, max_new_tokens=30)
    whole = bytes(setup.greedy(b"hello", 30)).decode()
    letter = next(each for each in whole if whole.count(each) > 1)
    least = whole.index(letter) + 1
    params = SamplingParams(stop=letter, min_new_tokens=least)
    if is_streamed:
        text = "".join(chunk.text for chunk in setup.engine().stream("hello", params))
    else:
        text = setup.engine().generate("hello", params)[0].text
    assert text == whole[: whole.index(letter, least)]


def test_ranks_share_the_wishes(tiny: SimpleNamespace) -> None:
    prompts, params = tiny.ragged_prompts(len(SETTINGS)), [SamplingParams(**each) for each in SETTINGS]

    def program(group: object) -> list[tuple[int, ...]]:
        engine = tiny.Setup(alphabet=LETTERS).engine(group, tiny.NullGuard())
        return [output.token_ids for output in engine.generate(prompts, params)]

    alone = tiny.Setup(alphabet=LETTERS).engine().generate(prompts, params)
    assert tiny.run_ranks(2, program) == [[output.token_ids for output in alone]] * 2


def test_row_in_which_every_token_would_end_is_marked(tiny: SimpleNamespace) -> None:
    nothing = _request([1], [], min_new_tokens=2, stop_token_ids=list(range(VOCAB_SIZE)))
    assert Sampler(SINGLE, (0, VOCAB_SIZE)).sample(_logits(1), [nothing]) == [NOTHING_LEFT]
    engine = tiny.Setup(alphabet=[97, 98]).engine()
    with pytest.raises(RequestError, match="min_new_tokens=3 forbids every token"):
        engine.generate([[1]], SamplingParams(min_new_tokens=3, stop_token_ids=[97, 98]))
    both = SamplingParams(min_new_tokens=3, stop_token_ids=[97], no_repeat_ngram_size=1)
    with pytest.raises(RequestError, match="no_repeat_ngram_size=1 and min_new_tokens=3 forbid every token"):
        engine.generate([[1]], both)


def test_what_does_not_fit_is_refused_before_it_is_queued(tiny: SimpleNamespace) -> None:
    engine = tiny.Setup(max_new_tokens=16).engine()
    with pytest.raises(RequestError, match=r"logit_bias=\[259\] are not in the vocabulary"):
        engine.generate([[1]], SamplingParams(logit_bias={258: 1.0, 259: 1.0}))
    for params in (SamplingParams(min_new_tokens=17), SamplingParams(min_new_tokens=4, max_new_tokens=3)):
        with pytest.raises(RequestError, match=r"min_new_tokens=\d+ exceeds max_new_tokens="):
            engine.generate([[1]], params)
