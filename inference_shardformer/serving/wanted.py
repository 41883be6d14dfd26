"""Wanted: what a request to one of the two generating routes asks for, checked field by field."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from inference_shardformer import SamplingParams
from inference_shardformer.errors import RequestError
from inference_shardformer.serving.api_error import ApiError
from inference_shardformer.serving.fields import CHAT, COMPLETION, SAMPLING, STREAM_OPTIONS, checked, missing
from inference_shardformer.serving.rules import Rule


@dataclass(frozen=True)
class Wanted:
    """How to generate and how to answer, for both routes."""

    model: str
    params: SamplingParams
    is_streaming: bool
    includes_usage: bool


@dataclass(frozen=True)
class WantedCompletion(Wanted):
    """A request to /v1/completions."""

    prompts: list[str | list[int]]


@dataclass(frozen=True)
class WantedChat(Wanted):
    """A request to /v1/chat/completions; `messages` are not looked into yet."""

    messages: list[Any]


def completion(body: Mapping[str, object], *, models: Sequence[str]) -> WantedCompletion:
    """What a request to /v1/completions asks for. Raises `ApiError`."""
    fields = _fields(body, COMPLETION, needed=("model", "prompt"))
    prompt: Any = fields["prompt"]
    is_one = isinstance(prompt, str) or isinstance(prompt[0], int)
    return WantedCompletion(**_common(fields, models), prompts=[prompt] if is_one else prompt)


def chat(body: Mapping[str, object], *, models: Sequence[str]) -> WantedChat:
    """What a request to /v1/chat/completions asks for. Raises `ApiError`."""
    fields = _fields(body, CHAT, needed=("model", "messages"))
    if "max_tokens" in fields and "max_completion_tokens" in fields:
        raise ApiError(
            400,
            "max_tokens and max_completion_tokens are two names of one limit",
            remedy="give max_completion_tokens alone",
            param="max_tokens",
        )
    if "max_completion_tokens" in fields:
        fields["max_tokens"] = fields.pop("max_completion_tokens")
    wants_logprobs = fields.pop("logprobs", False) is True
    if "top_logprobs" in fields and not wants_logprobs:
        raise ApiError(
            400, "top_logprobs without logprobs=true", remedy="leave it out, or set logprobs", param="top_logprobs"
        )
    num_likeliest = fields.pop("top_logprobs", 0)
    if wants_logprobs:
        fields["logprobs"] = num_likeliest
    messages: Any = fields["messages"]
    return WantedChat(**_common(fields, models), messages=messages)


def _fields(body: Mapping[str, object], rules: Mapping[str, Rule], *, needed: tuple[str, ...]) -> dict[str, object]:
    fields = checked(body, rules)
    for name in needed:
        if name not in fields:
            raise missing(name, rules[name])
    return fields


def _common(fields: dict[str, object], models: Sequence[str]) -> dict[str, Any]:
    if fields["model"] not in models:
        raise ApiError(
            404,
            f"model={fields['model']!a} is not served here",
            remedy=f"choose one of {', '.join(models)}",
            code="model_not_found",
            param="model",
        )
    is_streaming = fields.get("stream", False) is True
    if "stream_options" in fields and not is_streaming:
        raise ApiError(
            400, "stream_options without stream=true", remedy="leave it out, or stream", param="stream_options"
        )
    given: Any = fields.get("stream_options", {})
    options = checked(given, STREAM_OPTIONS, within="stream_options")
    return {
        "model": fields["model"],
        "params": _sampling(fields),
        "is_streaming": is_streaming,
        "includes_usage": options.get("include_usage", False) is True,
    }


def _sampling(fields: Mapping[str, object]) -> SamplingParams:
    settings: dict[str, Any] = {name: value for name, value in fields.items() if name in SAMPLING}
    if "logprobs" in fields:
        settings["logprobs"] = fields["logprobs"]
    if "logit_bias" in settings:
        settings["logit_bias"] = {int(token_id): number for token_id, number in settings["logit_bias"].items()}
    if "max_tokens" in fields:
        settings["max_new_tokens"] = fields["max_tokens"]
    try:
        return SamplingParams(**settings)
    except RequestError as error:  # rules of the two differ, or values do not go together
        raise ApiError.of(error) from error
