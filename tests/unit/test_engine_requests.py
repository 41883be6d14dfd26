"""What is refused and why, requests added by hand, aborts, and the states of the engine."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest

from inference_shardformer.engine.calls import output_of
from inference_shardformer.engine.engine import InferenceEngine
from inference_shardformer.engine.outputs import RequestOutput
from inference_shardformer.engine.sampling_params import SamplingParams
from inference_shardformer.errors import RequestError, StateError


def _drain(engine: InferenceEngine) -> dict[str, RequestOutput]:
    outputs = []
    while engine.has_unfinished():
        outputs += engine.step()
        engine._core.scheduler.check_integrity()
    return {output.request_id: output for output in outputs}


BAD = [
    ("", None, "empty", "at least one token"),
    ([], None, "empty", "at least one token"),
    ([1, "2"], None, "'2', a str", "integers"),
    ([1, True], None, "True, a bool", "integers"),
    ([1, 2.0], None, "2.0, a float", "integers"),
    (b"abc", None, "is a bytes", "token ids"),
    ({1, 2}, None, "is a set", "token ids"),
    ([0, 259], None, "token id 259 at position 1", "0 to 258"),
    ([-1], None, "token id -1 at position 0", "0 to 258"),
    ([1, 10**5000], None, "token id <an integer of 16610 bits> at position 1", "0 to 258"),
    ("ab\udc80", None, "'\\udc80' at position 2 is half a character", "UTF-8"),
    ([1] * 128, None, "128 tokens and max_model_len=128", "at most 127"),
    ([1] * 100, SamplingParams(max_new_tokens=29), "max_new_tokens=29", "at most 28"),
    ([1] * 20, SamplingParams(max_new_tokens=70), "need 23 cache blocks", "at most 61"),
    ([1] * 90, SamplingParams(max_new_tokens=1), "need 23 cache blocks", "shorten the prompt"),
    ([1], SamplingParams(stop_token_ids=[300]), "stop_token_ids=[300]", "0 to 258"),
    ([1], "greedy", "sampling_params is a str", "pass SamplingParams"),
]


@pytest.mark.parametrize(("prompt", "params", "text", "remedy"), BAD, ids=[case[2] for case in BAD])
def test_bad_request_is_refused_with_the_way_out(
    tiny: SimpleNamespace, prompt: object, params: object, text: str, remedy: str
) -> None:
    engine = tiny.Setup(num_blocks=20).engine()
    with pytest.raises(RequestError) as caught:
        engine.add_request(prompt, params)
    assert text in caught.value.message
    assert remedy in caught.value.remedy
    tiny.assert_all_free(engine)


@pytest.mark.parametrize(("num_prompt", "num_new"), [(100, 28), (127, 1)])
def test_largest_legal_request_is_served(tiny: SimpleNamespace, num_prompt: int, num_new: int) -> None:
    setup = tiny.Setup(num_blocks=32)
    [output] = setup.engine().generate([[1] * num_prompt], SamplingParams(max_new_tokens=num_new))
    assert list(output.token_ids) == setup.greedy([1] * num_prompt, num_new)


def test_largest_request_of_the_cache_is_served(tiny: SimpleNamespace) -> None:
    setup = tiny.Setup(num_blocks=5)
    assert len(setup.engine().generate([[1] * 10], SamplingParams(max_new_tokens=11))[0].token_ids) == 11
    with pytest.raises(RequestError, match="at most 11"):
        setup.engine().generate([[1] * 10], SamplingParams(max_new_tokens=12))


def test_everything_wrong_with_a_request_is_said_at_once(tiny: SimpleNamespace) -> None:
    with pytest.raises(RequestError) as caught:
        tiny.Setup(tokenizer=None).engine().add_request([300] * 200, SamplingParams(stop="x"))
    assert all(text in str(caught.value) for text in ("token id 300", "no tokenizer", "max_model_len"))


def test_text_needs_a_tokenizer(tiny: SimpleNamespace) -> None:
    with pytest.raises(RequestError, match="no tokenizer"):
        tiny.Setup(tokenizer=None).engine().generate("hello")


@pytest.mark.parametrize(
    ("prompts", "params", "text"),
    [
        ([], None, "holds no prompt"),
        (None, None, "holds no prompt"),
        ([1, 2], None, "flat list"),
        ([[1], [2]], [SamplingParams()], "1 sampling_params were given for 2 prompts"),
        ([[1]], 3, "sampling_params is a int"),
    ],
)
def test_bad_call_is_refused(tiny: SimpleNamespace, prompts: object, params: object, text: str) -> None:
    engine = tiny.Setup().engine()
    for call in (engine.generate, engine.stream):
        with pytest.raises(RequestError, match=text):
            call(prompts, params)
    with pytest.raises(RequestError, match="on_error='skip'"):
        engine.generate("x", on_error="skip")


def test_one_error_names_every_bad_prompt_and_nothing_is_queued(tiny: SimpleNamespace) -> None:
    engine = tiny.Setup().engine()
    for call in (engine.generate, engine.stream):
        with pytest.raises(RequestError, match=r"2 of 4 requests cannot be served") as caught:
            call([[1], [], "fine", [999]])
        assert "prompts[1]: the prompt is empty" in str(caught.value)
        assert "prompts[3]: token id 999" in str(caught.value)
    tiny.assert_all_free(engine)


def test_bad_prompts_come_back_while_the_others_run(tiny: SimpleNamespace) -> None:
    setup = tiny.Setup()
    outputs = setup.engine().generate([[], [1], "", [2]], on_error="return")
    assert [output.finish_reason for output in outputs] == ["rejected", "length", "rejected", "length"]
    assert [output.index for output in outputs] == [0, 1, 2, 3]
    assert isinstance(outputs[0].error, RequestError)
    assert outputs[2].prompt == ""
    assert list(outputs[3].token_ids) == setup.greedy([2], 16)
    assert setup.engine().generate([[]], on_error="return")[0].finish_reason == "rejected"


def test_single_text_and_numpy_ids_are_prompts(tiny: SimpleNamespace) -> None:
    setup = tiny.Setup()
    [output] = setup.engine().generate("ab")
    assert output.prompt == "ab"
    assert list(output.token_ids) == setup.greedy(b"ab", 16)
    [output] = setup.engine().generate([list(np.array([97, 98]))])
    assert output.prompt is None
    assert list(output.token_ids) == setup.greedy(b"ab", 16)


def test_requests_join_between_steps(tiny: SimpleNamespace) -> None:
    setup = tiny.Setup(num_blocks=16)
    engine = setup.engine()
    prompts = dict(zip("abcdef", tiny.ragged_prompts(6), strict=True))
    outputs = []
    for name, prompt in prompts.items():
        assert engine.add_request(prompt, request_id=name) == name
        outputs += engine.step()
    assert engine.num_unfinished == 6 - len(outputs)
    finished = {output.request_id: output for output in outputs} | _drain(engine)
    for name, prompt in prompts.items():
        assert list(finished[name].token_ids) == setup.greedy(prompt, 16)
    tiny.assert_all_free(engine)


def test_ids_are_unique_while_in_use(tiny: SimpleNamespace) -> None:
    engine = tiny.Setup().engine()
    engine.add_request([1], request_id="request-1")
    with pytest.raises(RequestError, match="request-1"):
        engine.add_request([1], request_id="request-1")
    with pytest.raises(RequestError, match="not text"):
        engine.add_request([1], request_id=3)
    names = [engine.add_request([1]) for _ in range(3)]
    engine.step()
    with pytest.raises(RequestError, match="in use"):
        engine.add_request([1], request_id=names[0])
    names.append(engine.add_request([1]))
    assert len({*names, "request-1"}) == 5
    assert set(_drain(engine)) == {*names, "request-1"}
    assert engine.add_request([1], request_id="request-1") == "request-1"


def test_abort_at_any_time_frees_at_once_and_disturbs_nobody(tiny: SimpleNamespace) -> None:
    setup = tiny.Setup(num_blocks=16)
    prompts = dict(zip("abcdefgh", tiny.ragged_prompts(8), strict=True))
    for victim in prompts:
        for moment in (0, 1, 5):
            engine = setup.engine()
            for name, prompt in prompts.items():
                engine.add_request(prompt, request_id=name)
            outputs = [output for _ in range(moment) for output in engine.step()]
            assert engine.abort(victim)
            assert not engine.abort(victim)
            engine._core.scheduler.check_integrity()
            finished = {output.request_id: output for output in outputs} | _drain(engine)
            for name, prompt in prompts.items():
                wanted = setup.greedy(prompt, 16)
                assert list(finished[name].token_ids) == wanted[: len(finished[name].token_ids)]
                assert finished[name].finish_reason == ("abort" if name == victim else "length")
            tiny.assert_all_free(engine)


def test_running_request_has_no_output_yet(tiny: SimpleNamespace) -> None:
    engine = tiny.Setup().engine()
    engine.add_request([1], request_id="a")
    engine.step()
    with pytest.raises(StateError, match="'a' is running"):
        output_of(engine._core.live["a"])


def test_abort_of_an_unknown_request_says_so(tiny: SimpleNamespace) -> None:
    assert tiny.Setup().engine().abort("nobody") is False


def test_generate_keeps_the_outputs_of_added_requests_for_step(tiny: SimpleNamespace) -> None:
    engine = tiny.Setup().engine()
    engine.add_request([1], SamplingParams(max_new_tokens=2), request_id="mine")
    assert len(engine.generate([[2]])) == 1
    assert engine.has_unfinished()
    assert [output.request_id for output in engine.step()] == ["mine"]
    assert not engine.has_unfinished()


def test_threads_share_an_engine(tiny: SimpleNamespace) -> None:
    setup = tiny.Setup(num_blocks=24)
    engine = setup.engine()
    prompts = tiny.ragged_prompts(12, seed=4)
    with ThreadPoolExecutor(4) as pool:
        outputs = list(pool.map(lambda prompt: engine.generate([prompt])[0], prompts))
    for prompt, output in zip(prompts, outputs, strict=True):
        assert list(output.token_ids) == setup.greedy(prompt, 16)
    tiny.assert_all_free(engine)


def test_closed_engine_refuses_every_call_by_name(tiny: SimpleNamespace) -> None:
    with tiny.Setup().engine() as engine:
        engine.add_request([1])
        chunks = engine.stream([[1]])
    engine.close()
    calls = {
        "generate()": lambda: engine.generate([[1]]),
        "stream()": lambda: engine.stream([[1]]),
        "add_request()": lambda: engine.add_request([1]),
        "step()": engine.step,
        "abort()": lambda: engine.abort("request-0"),
        "num_unfinished": lambda: engine.num_unfinished,
        "kv_cache": lambda: engine.kv_cache,
        "with": engine.__enter__,
    }
    for name, call in calls.items():
        with pytest.raises(StateError, match="closed") as caught:
            call()
        assert caught.value.message.startswith(name)
        assert "close()" in caught.value.remedy
    with pytest.raises(StateError, match="closed"):
        next(chunks)


def test_closing_while_a_stream_is_open_ends_the_stream(tiny: SimpleNamespace) -> None:
    engine = tiny.Setup().engine()
    chunks = engine.stream([[1]])
    next(chunks)
    engine.close()
    with pytest.raises(StateError, match="closed"):
        list(chunks)
