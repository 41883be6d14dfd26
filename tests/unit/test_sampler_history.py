"""Repetition penalty and forbidden n-grams against Hugging Face's processors, on any number of ranks."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import NoRepeatNGramLogitsProcessor, RepetitionPenaltyLogitsProcessor

from inference_shardformer.config.inference import SamplingDefaults
from inference_shardformer.distributed.tensor_parallel import TensorParallelGroup
from inference_shardformer.engine.distribution import draw, probabilities, uniform
from inference_shardformer.engine.history import completing_tokens, look_back
from inference_shardformer.engine.request import Request
from inference_shardformer.engine.sampler import NOT_FINITE, NOTHING_LEFT, Sampler
from inference_shardformer.engine.sampling_params import SamplingParams
from inference_shardformer.errors import RequestError

VOCAB_SIZE = 31
SINGLE = TensorParallelGroup.single(torch.device("cpu"))
SETTINGS = [
    {},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.7},
    {"no_repeat_ngram_size": 1},
    {"no_repeat_ngram_size": 2},
    {"no_repeat_ngram_size": 3},
    {"repetition_penalty": 5.0, "no_repeat_ngram_size": 2},
    {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "temperature": 0.8, "seed": 4},
    {"temperature": 0.8, "seed": 5},
]


def _request(token_ids: list[int], num_prompt_tokens: int = 1, **settings: object) -> Request:
    request = Request("r", token_ids[:num_prompt_tokens], SamplingParams(**settings).resolve(SamplingDefaults()))
    request.token_ids += token_ids[num_prompt_tokens:]
    return request


def _logits(num_rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_rows, VOCAB_SIZE, generator=torch.Generator().manual_seed(seed)) * 3


def _hugging_face(row: torch.Tensor, request: Request) -> torch.Tensor:
    sampling, ids, scores = request.sampling, torch.tensor([request.token_ids]), row.clone().unsqueeze(0)
    if sampling.repetition_penalty != 1.0:
        scores = RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)(ids, scores)
    if sampling.no_repeat_ngram_size:
        scores = NoRepeatNGramLogitsProcessor(sampling.no_repeat_ngram_size)(ids, scores)
    return scores[0]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=20),
    st.sampled_from([0.3, 1.0, 1.2, 4.0]),
    st.integers(0, 6),
    st.integers(0, 99),
)
def test_logits_equal_those_of_hugging_face(token_ids: list[int], penalty: float, size: int, seed: int) -> None:
    request = _request(token_ids, repetition_penalty=penalty, no_repeat_ngram_size=size)
    logits = _logits(1, seed)
    expected = _hugging_face(logits[0], request)
    look_back(logits, [request])
    assert torch.equal(logits[0], expected)


@pytest.mark.parametrize("penalty", [5e-324, 1e-300, 1e300])
@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0}, {"temperature": 0.7, "top_p": 0.5, "top_k": 3}])
def test_a_penalty_beyond_float32_draws_what_its_limit_would(penalty: float, settings: dict[str, float]) -> None:
    """All weight is on what was said before, or on everything else."""
    logits = _logits(40)
    logits[:, 3] = 0.0
    liked = logits[:, 7] > 0
    requests = [_request([3, 7], seed=row, repetition_penalty=penalty, **settings) for row in range(40)]
    chosen = torch.tensor(Sampler(SINGLE, (0, VOCAB_SIZE)).sample(logits, requests))
    assert chosen.min() >= 0
    assert chosen.max() < VOCAB_SIZE
    if penalty < 1:
        assert set(chosen[liked].tolist()) == {7}
    else:
        assert 7 not in chosen[~liked].tolist()


def test_ngrams_are_found_where_they_are_written_down() -> None:
    assert completing_tokens([1, 2, 3, 1, 2], 3).tolist() == [3]
    assert completing_tokens([1, 2, 1, 3, 1], 2).tolist() == [2, 3]
    assert completing_tokens([1, 1], 2).tolist() == [1]
    assert completing_tokens([4, 9, 4], 1).tolist() == [4, 9]
    assert completing_tokens([1, 2], 3).tolist() == []
    assert completing_tokens([1, 2, 1], 9).tolist() == []


def _mixed() -> list[Request]:
    rng = random.Random(2)
    return [
        _request([rng.randrange(6) for _ in range(3 + i)], num_prompt_tokens=1 + i % 3, **given)
        for i, given in enumerate(SETTINGS * 2)
    ]


def _expected(logits: torch.Tensor, request: Request) -> int:
    scores = _hugging_face(logits, request)
    if request.sampling.is_greedy:
        return int(scores.argmax())
    sampling = request.sampling
    probs = probabilities(scores.unsqueeze(0), [sampling.temperature], [sampling.top_k], [sampling.top_p])
    return int(draw(probs, [uniform(sampling.seed, request.num_output_tokens)]))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_choice_is_that_of_hugging_face_in_company_and_on_any_number_of_ranks(tiny: SimpleNamespace, size: int) -> None:
    requests = _mixed()
    logits = _logits(len(requests), seed=5)
    logits[0, 3] = torch.nan
    logits[1, 3] = torch.inf
    before = logits.clone()
    width = -(-VOCAB_SIZE // size)

    def program(group: object) -> list[int]:
        start, end = group.rank * width, min(VOCAB_SIZE, (group.rank + 1) * width)
        local = torch.full((len(requests), width + 1), 1000.0)
        local[:, : end - start] = logits[:, start:end]
        return Sampler(group, (start, end)).sample(local, requests)

    chosen = tiny.run_ranks(size, program)
    assert chosen == [chosen[0]] * size
    assert chosen[0][:2] == [NOT_FINITE, NOT_FINITE]
    assert chosen[0][2:] == [_expected(row, request) for row, request in zip(logits[2:], requests[2:], strict=True)]
    assert torch.equal(logits.nan_to_num(), before.nan_to_num())  # the model's logits stay as they are
    plain = Sampler(SINGLE, (0, VOCAB_SIZE)).sample(logits, [_request([1])] * len(requests))
    assert plain != chosen[0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_row_in_which_every_token_is_forbidden_is_marked(temperature: float) -> None:
    everything = _request(list(range(VOCAB_SIZE)), no_repeat_ngram_size=1, temperature=temperature)
    chosen = Sampler(SINGLE, (0, VOCAB_SIZE)).sample(_logits(2), [everything, _request([1])])
    assert chosen[0] == NOTHING_LEFT
    assert chosen[1] >= 0


@pytest.mark.parametrize("limits", [{}, {"num_blocks": 14, "max_num_batched_tokens": 11}], ids=["roomy", "preempted"])
def test_generation_is_the_same_alone_in_company_and_after_preemption(tiny: SimpleNamespace, limits: dict) -> None:
    prompts = tiny.ragged_prompts(8)
    params = [SamplingParams(**{"seed": i, **SETTINGS[i % len(SETTINGS)]}) for i in range(1, 9)]
    setup = tiny.Setup(alphabet=range(97, 123), **limits)
    alone = [setup.engine().generate([p], s)[0].token_ids for p, s in zip(prompts, params, strict=True)]
    engine = setup.engine()
    outputs = engine.generate(prompts, params)
    assert [output.token_ids for output in outputs] == alone
    assert (sum(output.usage.num_preemptions for output in outputs) > 0) == bool(limits)
    for prompt, param, output in zip(prompts, params, outputs, strict=True):
        tokens = [*prompt, *output.token_ids]
        for end in range(len(prompt), len(tokens)):
            size = param.no_repeat_ngram_size or 0
            assert not size or tokens[end] not in completing_tokens(tokens[:end], size)
    tiny.assert_all_free(engine)


def test_request_without_a_token_left_ends_with_the_reason(tiny: SimpleNamespace) -> None:
    engine = tiny.Setup(alphabet=[97, 98, 99]).engine()
    params = SamplingParams(no_repeat_ngram_size=1)
    [output, other] = engine.generate([[1], [2]], [params, SamplingParams()], on_error="return")
    assert sorted(output.token_ids) == [97, 98, 99]
    assert output.finish_reason == "abort"
    assert len(other.token_ids) == 16
    with pytest.raises(RequestError, match="no_repeat_ngram_size=1 forbids every token"):
        engine.generate([[1]], params)


def test_defaults_of_the_configuration_hold_unless_a_request_says_otherwise() -> None:
    defaults = SamplingDefaults(repetition_penalty=1.5, no_repeat_ngram_size=3, ignore_eos=True)
    resolved = SamplingParams().resolve(defaults)
    assert (resolved.repetition_penalty, resolved.no_repeat_ngram_size, resolved.ignore_eos) == (1.5, 3, True)
    own = SamplingParams(repetition_penalty=1, no_repeat_ngram_size=0, ignore_eos=False).resolve(defaults)
    assert (own.repetition_penalty, own.no_repeat_ngram_size, own.ignore_eos, own.looks_back) == (1.0, 0, False, False)
