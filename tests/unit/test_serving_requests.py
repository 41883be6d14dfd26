"""What requests may hold: every wrong one is refused with its field, the rule and a remedy; none is passed over."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("starlette")

from hypothesis import given, settings
from hypothesis import strategies as st

from inference_shardformer.engine.sampling_params import SamplingParams
from inference_shardformer.errors import (
    CapacityError,
    QueueFullError,
    RankFailure,
    RequestError,
    StateError,
)
from inference_shardformer.serving import wanted
from inference_shardformer.serving.api_error import ApiError
from inference_shardformer.serving.chat_template import ChatTemplate
from inference_shardformer.serving.fields import CHAT, COMPLETION, SAMPLING, UNSUPPORTED

MODELS = ("m", "other")
GOOD = {"model": "m", "prompt": "x"}
TALK = {"model": "m", "messages": [{"role": "user", "content": "x"}]}


def completion(**fields: object) -> wanted.WantedCompletion:
    return wanted.completion({**GOOD, **fields}, models=MODELS)


def chat(**fields: object) -> wanted.WantedChat:
    return wanted.chat({**TALK, **fields}, models=MODELS)


def test_every_field_reaches_the_engine_under_its_name() -> None:
    given = {
        "temperature": 1,
        "top_p": 0.5,
        "top_k": 3,
        "repetition_penalty": 1.5,
        "no_repeat_ngram_size": 2,
        "min_p": 0.1,
        "presence_penalty": -1,
        "frequency_penalty": 2,
        "logit_bias": {"5": 1.5, "0": -100},
        "min_new_tokens": 1,
        "seed": 5,
        "stop": ["a", "b"],
        "stop_token_ids": [1, 2],
        "ignore_eos": True,
        "skip_special_tokens": False,
    }
    assert given.keys() == SAMPLING.keys()
    expected = SamplingParams(**{**given, "logit_bias": {0: -100, 5: 1.5}}, max_new_tokens=9, logprobs=3)
    assert completion(**given, max_tokens=9, logprobs=3).params == expected
    assert chat(**given, max_completion_tokens=9, logprobs=True, top_logprobs=3).params == expected
    assert chat(logprobs=True).params == SamplingParams(logprobs=0)
    assert chat(logprobs=False).params == SamplingParams()


def test_what_is_left_out_or_null_is_the_engine_s_default() -> None:
    asked = completion(**dict.fromkeys([*SAMPLING, *UNSUPPORTED, "max_tokens", "stream", "stream_options", "user"]))
    assert asked == wanted.WantedCompletion("m", SamplingParams(), False, False, ["x"])
    assert chat(max_tokens=None, max_completion_tokens=4).params == SamplingParams(max_new_tokens=4)


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("x", ["x"]), (["x", ""], ["x", ""]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]]), ("", [""])],
)
def test_forms_of_a_prompt(prompt: object, prompts: list) -> None:
    assert completion(prompt=prompt).prompts == prompts


NEUTRAL = {
    "n": 1,
    "best_of": 1,
    "echo": False,
    "suffix": "",
    "response_format": {"type": "text"},
    "tools": [],
    "tool_choice": "auto",
    "parallel_tool_calls": True,
    "service_tier": "auto",
    "store": False,
    "metadata": {},
    "modalities": ["text"],
}


def test_what_asks_for_nothing_is_let_pass() -> None:
    assert completion(**NEUTRAL) == completion()
    assert NEUTRAL.keys() <= UNSUPPORTED.keys()


@pytest.mark.parametrize("name", UNSUPPORTED)
@pytest.mark.parametrize("make", [completion, chat])
def test_what_is_not_supported_is_refused_by_name(name: str, make) -> None:
    for value in (2, True if name != "parallel_tool_calls" else 1, "x", ["x"], {"type": "json_object"}):
        with pytest.raises(ApiError) as caught:
            make(**{name: value})
        assert (caught.value.status, caught.value.param) == (400, name)
        assert caught.value.code == "unsupported_field"
        assert name in caught.value.message
        assert caught.value.remedy


@pytest.mark.parametrize(
    ("make", "fields", "param", "code", "words"),
    [
        (
            completion,
            {"temperature": -1},
            "temperature",
            "invalid_value",
            "temperature=-1 must be a number, at least 0",
        ),
        (completion, {"temperature": True}, "temperature", "invalid_value", "True"),
        (completion, {"temperature": "1"}, "temperature", "invalid_value", "'1'"),
        (completion, {"temperature": 1e400}, "temperature", "invalid_value", "inf"),
        (completion, {"temperature": 10**400}, "temperature", "invalid_value", "..."),
        (completion, {"top_p": 0}, "top_p", "invalid_value", "above 0"),
        (completion, {"top_k": -1}, "top_k", "invalid_value", "at least 0"),
        (completion, {"top_k": 1.0}, "top_k", "invalid_value", "integer"),
        (completion, {"seed": 2**63}, "seed", "invalid_value", "below 9223372036854775808"),
        (completion, {"max_tokens": 0}, "max_tokens", "invalid_value", "at least 1"),
        (completion, {"stop": ""}, "stop", "invalid_value", "none of them empty"),
        (completion, {"stop": ["a", 1]}, "stop", "invalid_value", "a list of texts"),
        (completion, {"stop": "\ud800"}, "stop", "invalid_value", "\\ud800"),
        (completion, {"stream": 1}, "stream", "invalid_value", "true or false"),
        (completion, {"stream_options": {"include_usage": True}}, "stream_options", "invalid_value", "without stream"),
        (
            completion,
            {"stream": True, "stream_options": {"include_usag": True}},
            "stream_options.include_usag",
            "unknown_field",
            "include_usag",
        ),
        (
            completion,
            {"stream": True, "stream_options": {"include_usage": 1}},
            "stream_options.include_usage",
            "invalid_value",
            "true or false",
        ),
        (completion, {"prompt": None}, "prompt", "missing_field", "prompt is missing"),
        (completion, {"prompt": []}, "prompt", "invalid_value", "text, a list of texts"),
        (completion, {"prompt": [[]]}, "prompt", "invalid_value", "text, a list of texts"),
        (completion, {"prompt": ["x", [1]]}, "prompt", "invalid_value", "text, a list of texts"),
        (completion, {"prompt": [1, True]}, "prompt", "invalid_value", "text, a list of texts"),
        (completion, {"prompt": "\udfff"}, "prompt", "invalid_value", "\\udfff"),
        (completion, {"model": None}, "model", "missing_field", "model is missing"),
        (completion, {"logprobs": 129}, "logprobs", "invalid_value", "below 129"),
        (completion, {"logprobs": True}, "logprobs", "invalid_value", "an integer"),
        (completion, {"top_logprobs": 1}, "top_logprobs", "unknown_field", "did you mean logprobs?"),
        (chat, {"logprobs": 1}, "logprobs", "invalid_value", "true or false"),
        (chat, {"top_logprobs": 1}, "top_logprobs", "invalid_value", "without logprobs=true"),
        (completion, {"min_p": 1.5}, "min_p", "invalid_value", "from 0 to 1"),
        (completion, {"presence_penalty": 3}, "presence_penalty", "invalid_value", "from -2 to 2"),
        (completion, {"logit_bias": {"x": 1}}, "logit_bias", "invalid_value", "by token ids"),
        (completion, {"logit_bias": {"01": 1}}, "logit_bias", "invalid_value", "by token ids"),
        (completion, {"logit_bias": {"1": 101}}, "logit_bias", "invalid_value", "-100 to 100"),
        (completion, {"messages": []}, "messages", "unknown_field", "messages"),
        (completion, {"tempratur": 1}, "tempratur", "unknown_field", "did you mean temperature?"),
        (completion, {"x" * 500: 1}, "x" * 500, "unknown_field", "..."),
        (completion, {"max_completion_tokens": 1}, "max_completion_tokens", "unknown_field", "max_completion_tokens"),
        (chat, {"messages": []}, "messages", "invalid_value", "at least one message"),
        (chat, {"prompt": "x"}, "prompt", "unknown_field", "prompt"),
        (chat, {"max_tokens": 1, "max_completion_tokens": 1}, "max_tokens", "invalid_value", "two names"),
    ],
)
def test_what_is_wrong_is_told_with_field_rule_and_remedy(make, fields, param, code, words) -> None:
    with pytest.raises(ApiError) as caught:
        make(**fields)
    error = caught.value
    assert (error.status, error.param, error.code) == (400, param, code)
    assert words in f"{error.message} {error.remedy}"
    assert error.remedy
    assert len(error.message) < 300


def test_all_that_is_wrong_is_told_at_once() -> None:
    with pytest.raises(ApiError) as caught:
        completion(n=3, top_p=2, foo=1)
    assert caught.value.param == "n"
    assert all(word in caught.value.message for word in ("n=3", "top_p=2", "foo"))


def test_another_model_is_not_found() -> None:
    with pytest.raises(ApiError, match="'gpt' is not served") as caught:
        completion(model="gpt")
    assert (caught.value.status, caught.value.code) == (404, "model_not_found")
    assert "m, other" in caught.value.remedy
    assert completion(model="other").model == "other"


surrogates = st.characters(exclude_categories=())
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(surrogates),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from([*COMPLETION, *CHAT, *UNSUPPORTED]) | st.text(surrogates, max_size=4), anything, max_size=4
    )
)
def test_anything_is_taken_or_refused_in_order(fields: dict) -> None:
    for make in (wanted.completion, wanted.chat):
        try:
            asked = make({**GOOD, **fields} if make is wanted.completion else {**TALK, **fields}, models=MODELS)
            if isinstance(asked, wanted.WantedChat):
                ChatTemplate(_Tokenizer()).token_ids(asked.messages)
        except ApiError as refusal:
            told = json.loads(refusal.response().body)["error"]
            assert told["param"] is not None
            assert told["remedy"]


class _Tokenizer:
    chat_template = "own"

    def apply_chat_template(self, conversation, *, chat_template, tokenize, add_generation_prompt):
        assert not tokenize
        assert add_generation_prompt
        if conversation[0]["role"] == "assistant":
            raise ValueError("the user speaks first")
        return f"{chat_template}:" + "|".join(f"{message['role']}={message['content']}" for message in conversation)

    def encode(self, text, *, add_special_tokens):
        assert not add_special_tokens
        return list(text.encode())


def _talk(*messages: object, template: str | None = None) -> str:
    return bytes(ChatTemplate(_Tokenizer(), template=template).token_ids(messages)).decode()


def test_messages_go_through_the_template() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "developer", "content": "d"}, {"role": "user", "content": parts}]
    assert _talk(*messages) == "None:system=d|user=ab"
    assert _talk(*messages, template="mine") == "mine:system=d|user=ab"


@pytest.mark.parametrize(
    ("message", "param", "code"),
    [
        ("x", "messages[0]", "invalid_value"),
        ({"role": "user"}, "messages[0].content", "missing_field"),
        ({"content": "x"}, "messages[0].role", "missing_field"),
        ({"role": "tool", "content": "x"}, "messages[0].role", "invalid_value"),
        ({"role": ["user"], "content": "x"}, "messages[0].role", "invalid_value"),
        ({"role": "user", "content": "x", "name": "a"}, "messages[0].name", "unknown_field"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": "x"}]},
            "messages[0].content",
            "invalid_value",
        ),
        ({"role": "user", "content": []}, "messages[0].content", "invalid_value"),
        ({"role": "assistant", "content": "x"}, "messages", "chat_template"),
    ],
)
def test_messages_that_are_wrong(message, param, code) -> None:
    with pytest.raises(ApiError) as caught:
        _talk(message)
    assert (caught.value.status, caught.value.param, caught.value.code) == (400, param, code)


@pytest.mark.parametrize("tokenizer", [None, type("Plain", (_Tokenizer,), {"chat_template": None})()])
def test_a_model_without_template_says_so(tokenizer) -> None:
    with pytest.raises(ApiError, match=r"no tokenizer|no chat template") as caught:
        ChatTemplate(tokenizer).token_ids([{"role": "user", "content": "x"}])
    assert caught.value.code == "no_chat_template"
    assert "--chat-template" in caught.value.remedy


@pytest.mark.parametrize(
    ("error", "status", "code", "kind"),
    [
        (RequestError("no", remedy="r"), 400, "request", "invalid_request_error"),
        (QueueFullError("no", remedy="r"), 429, "queue_full", "rate_limit_error"),
        (RankFailure(rank=1, phase="decode", cause="boom"), 503, "rank_failure", "server_error"),
        (StateError("no", remedy="r"), 503, "stopping", "server_error"),
        (CapacityError("no", remedy="r"), 503, "capacity", "server_error"),
    ],
)
def test_errors_of_the_engine(error, status, code, kind) -> None:
    refusal = ApiError.of(error, param="prompt")
    assert (refusal.status, refusal.code) == (status, code)
    told = refusal.to_json()["error"]
    assert (told["type"], told["param"], told["remedy"]) == (kind, "prompt", error.remedy)
    assert error.message in told["message"]
    assert ("retry-after" in refusal.response().headers) == (status in (429, 503))
