"""Log-probabilities through the engine: with every output, in streams, over preemption, and on every rank."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from inference_shardformer.config.inference import SamplingDefaults
from inference_shardformer.engine.logprobs import TokenLogprobs
from inference_shardformer.engine.outputs import RequestOutput
from inference_shardformer.engine.sampling_params import MAX_LOGPROBS, SamplingParams
from inference_shardformer.engine.scorer import Scorer
from inference_shardformer.errors import RequestError

LETTERS = range(97, 123)
MIXED = [
    {"logprobs": 3},
    {},
    {"logprobs": 0},
    {"logprobs": 5, "temperature": 0.9, "seed": 4},
    {"temperature": 0.9, "seed": 5},
    {"logprobs": 2, "repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
    {"logprobs": 1, "temperature": 1.5, "top_k": 4, "seed": 6},
]


def _params(num_prompts: int) -> list[SamplingParams]:
    return [SamplingParams(**MIXED[i % len(MIXED)]) for i in range(num_prompts)]


def _assert_true(tiny: SimpleNamespace, output: RequestOutput, num_top: int | None, alphabet: range) -> None:
    """Against the log-softmax of what the model says about the tokens so far."""
    if num_top is None:
        assert output.logprobs is None
        return
    assert output.logprobs is not None
    assert len(output.logprobs) == len(output.token_ids)
    context = list(output.prompt_token_ids)
    for token_id, found in zip(output.token_ids, output.logprobs, strict=True):
        logits = tiny.next_logits(context, [0] * len(context), alphabet)
        expected = logits.double().log_softmax(dim=-1)
        order = expected.argsort(descending=True).tolist()
        assert found.chosen.token_id == token_id
        assert found.chosen.rank == order.index(token_id) + 1
        assert [each.token_id for each in found.top] == order[:num_top]
        for each in (found.chosen, *found.top):
            assert each.logprob == pytest.approx(expected[each.token_id].item(), abs=1e-5)
        context.append(token_id)


@pytest.mark.parametrize("overlap", ["off", "on"])
@pytest.mark.parametrize("limits", [{}, {"num_blocks": 16, "max_num_batched_tokens": 7}], ids=["roomy", "tight"])
def test_every_token_has_that_of_the_model(tiny: SimpleNamespace, limits: dict, overlap: str) -> None:
    engine = tiny.Setup(alphabet=LETTERS, overlap=overlap, **limits).engine()
    params = _params(9)
    outputs = engine.generate(tiny.ragged_prompts(9, longest=20), params)
    assert (sum(output.usage.num_preemptions for output in outputs) > 0) == bool(limits)
    for output, param in zip(outputs, params, strict=True):
        _assert_true(tiny, output, param.logprobs, LETTERS)
    tiny.assert_all_free(engine)


def test_sampling_changes_nothing_but_the_choice(tiny: SimpleNamespace) -> None:
    settings = [{"logprobs": 6}, {"logprobs": 6, "temperature": 3.0, "top_k": 2, "seed": 1, "repetition_penalty": 2.0}]
    engine = tiny.Setup(alphabet=LETTERS, max_new_tokens=1).engine()
    plain, warped = engine.generate([[98, 99]] * 2, [SamplingParams(**each) for each in settings])
    assert plain.logprobs[0].top == warped.logprobs[0].top


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_say_what_one_says(tiny: SimpleNamespace, size: int) -> None:
    prompts, params = tiny.ragged_prompts(8, longest=20), _params(8)

    def program(group: object) -> list[RequestOutput]:
        return tiny.Setup(alphabet=LETTERS).engine(group, tiny.NullGuard()).generate(prompts, params)

    results = tiny.run_ranks(size, program)
    assert results == [results[0]] * size
    for output, param in zip(results[0], params, strict=True):
        _assert_true(tiny, output, param.logprobs, LETTERS)


@pytest.mark.parametrize("overlap", ["off", "on"])
def test_a_stream_carries_what_the_output_does(tiny: SimpleNamespace, overlap: str) -> None:
    setup = tiny.Setup(alphabet=LETTERS, num_blocks=16, overlap=overlap)
    prompts, params = tiny.ragged_prompts(9, longest=20), _params(9)
    streamed: dict[int, list[TokenLogprobs]] = {}
    for chunk in setup.engine().stream(prompts, params):
        assert (chunk.logprobs is None) == (params[chunk.index].logprobs is None)
        if chunk.logprobs is not None:
            assert [each.chosen.token_id for each in chunk.logprobs] == list(chunk.token_ids)
            streamed.setdefault(chunk.index, []).extend(chunk.logprobs)
    outputs = setup.engine().generate(prompts, params)
    assert {i: tuple(each) for i, each in streamed.items()} == {
        output.index: output.logprobs for output in outputs if output.logprobs is not None
    }


def test_tokens_of_a_stop_text_keep_theirs(tiny: SimpleNamespace) -> None:
    setup = tiny.Setup(alphabet=LETTERS)
    whole = bytes(setup.greedy(b"hello", 16)).decode()
    [output] = setup.engine().generate("hello", SamplingParams(stop=whole[4:8], logprobs=1))
    assert output.text == whole[:4]
    assert len(output.logprobs) == len(output.token_ids) == 8


def test_aborted_and_failed_requests_keep_what_they_had(tiny: SimpleNamespace) -> None:
    setup = tiny.Setup(alphabet=LETTERS)
    engine = setup.engine()
    engine.add_request([98], SamplingParams(logprobs=2), request_id="gone")
    for _ in range(3):
        engine.step()
    engine.abort("gone")
    [output] = engine.step()
    _assert_true(tiny, output, 2, LETTERS)
    assert len(output.token_ids) == 3
    poison = next(t for t in setup.greedy([98], 16) if t != 98)
    engine = tiny.Setup(alphabet=LETTERS, poison=poison).engine()
    failed, other = engine.generate([[98], [100]], SamplingParams(logprobs=2, max_new_tokens=3), on_error="return")
    assert failed.error is not None
    _assert_true(tiny, failed, 2, LETTERS)
    assert len(other.logprobs) == len(other.token_ids)


def test_nobody_asks_nothing_is_exchanged(tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> torch.Tensor:
        raise AssertionError("nobody asked")

    monkeypatch.setattr(Scorer, "score_on_device", refuse)
    tiny.Setup().engine().generate(tiny.ragged_prompts(5))
    with pytest.raises(Exception, match="nobody asked"):
        tiny.Setup().engine().generate([[1]], SamplingParams(logprobs=0))


@pytest.mark.parametrize("value", [-1, MAX_LOGPROBS + 1, True, 1.0, "2"])
def test_bad_number_is_refused_by_name(value: object) -> None:
    with pytest.raises(RequestError, match=f"logprobs={value!r} must be an integer, at least 0, below 129"):
        SamplingParams(logprobs=value)


def test_more_than_the_vocabulary_is_refused_before_it_is_queued(tiny: SimpleNamespace) -> None:
    setup = tiny.Setup()
    facts = setup.facts()
    setup.facts = lambda: type(facts)(**{**vars(facts), "vocab_size": 100})
    with pytest.raises(RequestError, match="logprobs=101 are more tokens than there are"):
        setup.engine().generate([[1]], SamplingParams(logprobs=101))


def test_defaults_of_the_configuration_ask_for_none() -> None:
    assert SamplingParams().resolve(SamplingDefaults()).logprobs is None
    assert SamplingParams(logprobs=0).resolve(SamplingDefaults()).logprobs == 0
