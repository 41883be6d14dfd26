"""The sampler against Hugging Face's warpers, exact probabilities, and itself on several ranks."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from inference_shardformer.compute.sampling import Greatest
from inference_shardformer.config.inference import SamplingDefaults
from inference_shardformer.distributed.tensor_parallel import TensorParallelGroup
from inference_shardformer.engine import distribution
from inference_shardformer.engine.distribution import draw, uniform
from inference_shardformer.engine.request import Request
from inference_shardformer.engine.sampler import NOT_FINITE, Sampler
from inference_shardformer.engine.sampling_params import ResolvedSampling, SamplingParams
from inference_shardformer.kernels.cpu.library import native_problem
from inference_shardformer.kernels.cpu.search import argmax

VOCAB_SIZE = 53
SINGLE = TensorParallelGroup.single(torch.device("cpu"))


def _sampling(**settings: object) -> ResolvedSampling:
    return SamplingParams(**settings).resolve(SamplingDefaults())


def _request(*, num_output_tokens: int = 0, **settings: object) -> Request:
    request = Request("r", [1], _sampling(**settings))
    request.token_ids += [0] * num_output_tokens
    return request


def probabilities(logits: torch.Tensor, samplings: list[ResolvedSampling]) -> torch.Tensor:
    settings = zip(*((each.temperature, each.top_k, each.top_p) for each in samplings), strict=True)
    return distribution.probabilities(logits, *(list(each) for each in settings))


def _logits(num_rows: int, *, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_rows, VOCAB_SIZE, generator=torch.Generator().manual_seed(seed)) * 3


def _hugging_face(logits: torch.Tensor, sampling: ResolvedSampling) -> torch.Tensor:
    scores = TemperatureLogitsWarper(sampling.temperature)(None, logits.unsqueeze(0))
    if sampling.top_k:
        scores = TopKLogitsWarper(sampling.top_k)(None, scores)
    if sampling.top_p < 1.0:
        scores = TopPLogitsWarper(sampling.top_p)(None, scores)
    return scores.softmax(dim=-1)[0]


WARPED = [
    {"temperature": 1.0},
    {"temperature": 0.3},
    {"temperature": 2.5},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 1.0, "top_k": 7},
    {"temperature": 1.0, "top_k": 500},
    {"temperature": 1.0, "top_p": 0.8},
    {"temperature": 1.0, "top_p": 1e-6},
    {"temperature": 0.7, "top_k": 9, "top_p": 0.6},
]


@pytest.mark.parametrize("temperature", [5e-324, 1e-46, 1e-44, 1e-38])
def test_a_temperature_that_float32_does_not_know_draws_the_likeliest(temperature: float) -> None:
    logits = _logits(20)
    requests = [_request(temperature=temperature, seed=row, num_output_tokens=row) for row in range(20)]
    assert Sampler(SINGLE, (0, VOCAB_SIZE)).sample(logits, requests) == logits.argmax(dim=-1).tolist()


def test_distribution_equals_hugging_face_row_by_row() -> None:
    samplings = [_sampling(**settings) for settings in WARPED]
    for seed in range(20):
        logits = _logits(len(samplings), seed=seed)
        expected = torch.stack([_hugging_face(row, s) for row, s in zip(logits, samplings, strict=True)])
        torch.testing.assert_close(probabilities(logits, samplings), expected, rtol=1e-4, atol=1e-6)


def test_top_k_keeps_ties_as_hugging_face_does() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 3.0, 0.0]])
    sampling = _sampling(temperature=1.0, top_k=2)
    torch.testing.assert_close(probabilities(logits, [sampling])[0], _hugging_face(logits[0], sampling))


def test_tiny_temperature_stays_finite() -> None:
    probs = probabilities(_logits(1), [_sampling(temperature=1e-30)])
    assert probs.isfinite().all()
    assert probs.max() == 1.0


@pytest.mark.parametrize("settings", [WARPED[0], WARPED[8]], ids=["plain", "warped"])
def test_drawn_frequencies_fit_the_distribution(settings: dict[str, float]) -> None:
    num_draws = 20_000
    logits = _logits(1, seed=3)
    sampling = _sampling(**settings)
    expected = _hugging_face(logits[0], sampling).double()
    uniforms = [uniform(seed, count) for seed in range(200) for count in range(num_draws // 200)]
    counts = torch.bincount(draw(expected.float().expand(num_draws, -1), uniforms), minlength=VOCAB_SIZE).double()
    assert counts[expected == 0].sum() == 0
    likely = expected * num_draws >= 5
    chi_square = ((counts - expected * num_draws) ** 2 / (expected * num_draws))[likely].sum().item()
    freedom = int(likely.sum()) - 1
    assert chi_square < freedom + 5 * (2 * freedom) ** 0.5


def test_draw_is_the_inverse_of_the_cumulative_distribution() -> None:
    probs = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]]).expand(5, -1)
    assert draw(probs, [0.0, 0.2499, 0.25, 0.9, 1 - 2.0**-52]).tolist() == [1, 1, 3, 3, 3]


def test_uniform_numbers_depend_on_seed_and_count() -> None:
    numbers = {uniform(seed, count) for seed in range(50) for count in range(50)}
    assert len(numbers) == 2500
    assert all(0.0 <= number < 1.0 for number in numbers)
    assert abs(sum(numbers) / 2500 - 0.5) < 0.03


FINDERS = [pytest.param(None, id="torch")]
if native_problem() is None:
    FINDERS.append(pytest.param(argmax, id="cpu"))


def test_every_token_of_a_request_is_drawn_anew() -> None:
    logits = torch.zeros(40, VOCAB_SIZE)
    requests = [_request(temperature=1.0, seed=1, num_output_tokens=count) for count in range(40)]
    chosen = Sampler(SINGLE, (0, VOCAB_SIZE)).sample(logits, requests)
    assert len(set(chosen)) > 20


@pytest.mark.parametrize("greatest", FINDERS)
def test_greedy_is_the_first_of_equals_and_never_padding(greatest: Greatest | None) -> None:
    logits = torch.full((4, VOCAB_SIZE + 3), 100.0)
    logits[:, :VOCAB_SIZE] = _logits(4)
    logits[0, [7, 9, 30]] = 50.0
    logits[2, 5], logits[3, 6] = torch.nan, torch.inf
    expected = logits[:, :VOCAB_SIZE].argmax(dim=-1).tolist()
    chosen = Sampler(SINGLE, (0, VOCAB_SIZE), greatest=greatest).sample(logits, [_request()] * 4)
    assert chosen == [7, expected[1], NOT_FINITE, NOT_FINITE]


def test_greatest_that_are_known_are_not_looked_for() -> None:
    def refuse(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        raise AssertionError("the model has found them")

    logits = _logits(4)
    known = torch.tensor([1.0, 2.0, torch.nan, 4.0]), torch.tensor([11, 12, NOT_FINITE, 14])
    sampler = Sampler(SINGLE, (0, VOCAB_SIZE), greatest=refuse)
    assert sampler.sample_on_device(logits, [_request()] * 4, known).tolist() == [11, 12, NOT_FINITE, 14]
    mixed = [_request(), _request(temperature=1.0, top_k=1), _request(), _request()]
    expected = [11, int(logits[1].argmax()), NOT_FINITE, 14]
    assert sampler.sample_on_device(logits, mixed, known).tolist() == expected


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_that_are_not_finite_are_marked_alone(value: float, temperature: float) -> None:
    logits = _logits(3)
    logits[1, 5] = value
    chosen = Sampler(SINGLE, (0, VOCAB_SIZE)).sample(logits, [_request(temperature=temperature)] * 3)
    assert chosen[1] == NOT_FINITE
    assert chosen[0] != NOT_FINITE
    assert chosen[2] != NOT_FINITE


def test_what_draws_is_given_the_rows_that_draw_and_their_settings() -> None:
    given: list[object] = []

    def draw(logits: torch.Tensor, **settings: object) -> torch.Tensor:
        given.extend((logits.clone(), settings))
        return torch.tensor([11, 12])

    first, second = {"temperature": 0.5, "top_k": 3, "seed": 4}, {"temperature": 2.0, "top_p": 0.9, "seed": 5}
    requests = [_request(**first), _request(), _request(num_output_tokens=7, **second)]
    logits = _logits(3)
    sampler = Sampler(SINGLE, (0, VOCAB_SIZE), draw=draw)
    assert sampler.sample(logits, requests) == [11, int(logits[1].argmax()), 12]
    assert torch.equal(given[0], logits[[0, 2]])
    assert given[1] == {
        "temperatures": [0.5, 2.0],
        "top_ks": [3, 0],
        "top_ps": [1.0, 0.9],
        "uniforms": [uniform(4, 0), uniform(5, 7)],
    }
    assert sampler.sample(logits[1:2], [_request()]) == [int(logits[1].argmax())]
    assert len(given) == 2


def test_no_rows_choose_nothing() -> None:
    assert Sampler(SINGLE, (0, VOCAB_SIZE)).sample(torch.empty(0, VOCAB_SIZE), []) == []


def test_choice_is_the_same_alone_and_in_company() -> None:
    sampler = Sampler(SINGLE, (0, VOCAB_SIZE))
    requests = [_request(seed=i, num_output_tokens=i, **settings) for i, settings in enumerate(WARPED)] + [_request()]
    logits = _logits(len(requests), seed=5)
    together = sampler.sample(logits, requests)
    alone = [sampler.sample(logits[i : i + 1], [request])[0] for i, request in enumerate(requests)]
    backwards = sampler.sample(logits.flip(0), requests[::-1])[::-1]
    assert together == alone == backwards
    assert Sampler(SINGLE, (0, VOCAB_SIZE)).sample(logits, [_request(seed=9, temperature=9.0)] * 10) != together


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("padding", ["last rank", "every rank"])
def test_sharded_vocabulary_chooses_what_one_rank_chooses(tiny: SimpleNamespace, size: int, padding: str) -> None:
    requests = [_request(seed=i, **settings) for i, settings in enumerate(WARPED)] + [_request(), _request()]
    logits = _logits(len(requests), seed=8)
    logits[-1, :] = 1.0  # all equal: the lowest id must win
    logits[3, 4] = torch.nan
    bounds = [0, *(round(VOCAB_SIZE * (rank + 1) / size) for rank in range(size))]
    width = max(end - start for start, end in pairwise(bounds)) + 2
    if padding == "last rank":
        width = 30
        bounds = [min(VOCAB_SIZE, width * rank) for rank in range(size + 1)]

    def program(group: object) -> list[int]:
        start, end = bounds[group.rank], bounds[group.rank + 1]
        local = torch.full((len(requests), width), 1000.0)
        local[:, : end - start] = logits[:, start:end]
        return Sampler(group, (start, end)).sample(local, requests)

    expected = Sampler(SINGLE, (0, VOCAB_SIZE)).sample(logits, requests)
    assert expected[-1] == 0
    assert tiny.run_ranks(size, program) == [expected] * size
