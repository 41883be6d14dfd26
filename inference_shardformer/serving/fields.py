"""The fields of requests: which there are, what they may hold, and which ask for what this server does not do."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import NamedTuple

from inference_shardformer.engine.sampling_params import MAX_LOGPROBS
from inference_shardformer.serving.api_error import ApiError
from inference_shardformer.serving.rules import BIAS, FLAG, PROMPT, STOP, TEXT, TOKEN_IDS, Rule, integer, number

_ANY = Rule("anything", lambda value: True)

SAMPLING: dict[str, Rule] = {
    "temperature": number("a number, at least 0", lambda value: value >= 0),
    "top_p": number("a number above 0, at most 1", lambda value: 0 < value <= 1),
    "top_k": integer(low=0),
    "repetition_penalty": number("a number above 0", lambda value: value > 0),
    "no_repeat_ngram_size": integer(low=0),
    "min_p": number("a number from 0 to 1", lambda value: 0 <= value <= 1),
    "presence_penalty": number("a number from -2 to 2", lambda value: abs(value) <= 2),
    "frequency_penalty": number("a number from -2 to 2", lambda value: abs(value) <= 2),
    "logit_bias": BIAS,
    "min_new_tokens": integer(low=0),
    "seed": integer(low=0, below=2**63),
    "stop": STOP,
    "stop_token_ids": TOKEN_IDS,
    "ignore_eos": FLAG,
    "skip_special_tokens": FLAG,
}
"""What goes into `SamplingParams` under its own name."""

_COMMON: dict[str, Rule] = {
    **SAMPLING,
    "model": TEXT,
    "max_tokens": integer(low=1),
    "stream": FLAG,
    "stream_options": Rule("an object", lambda value: isinstance(value, dict)),
    "user": TEXT,
}
STREAM_OPTIONS: dict[str, Rule] = {"include_usage": FLAG}
_NUM_LIKELIEST = integer(low=0, below=MAX_LOGPROBS + 1)
COMPLETION: dict[str, Rule] = {**_COMMON, "prompt": PROMPT, "logprobs": _NUM_LIKELIEST}
CHAT: dict[str, Rule] = {
    **_COMMON,
    "max_completion_tokens": integer(low=1),
    "logprobs": FLAG,
    "top_logprobs": _NUM_LIKELIEST,
    "messages": Rule("a list with at least one message", lambda value: isinstance(value, list) and bool(value)),
}


class Unsupported(NamedTuple):
    """A field of the OpenAI API whose effect is not here; `neutral` values ask for none, and are let pass."""

    neutral: tuple[object, ...]
    remedy: str


_LEAVE_OUT = "leave it out"
_TEXT_ALONE = "leave it out: this server gives text alone"
_NO_TOOLS = "leave it out: this server calls no tools; describe them in a message"
UNSUPPORTED: dict[str, Unsupported] = {
    "n": Unsupported((1,), "send several requests"),
    "best_of": Unsupported((1,), "send several requests and compare"),
    "echo": Unsupported((False,), "put the prompt in front of the text yourself"),
    "suffix": Unsupported(("",), "leave it out: text is generated behind a prompt alone"),
    "response_format": Unsupported(({"type": "text"},), "ask for the format in the prompt"),
    "tools": Unsupported(([],), _NO_TOOLS),
    "tool_choice": Unsupported(("none", "auto"), _NO_TOOLS),
    "parallel_tool_calls": Unsupported((True, False), _NO_TOOLS),
    "functions": Unsupported(([],), _NO_TOOLS),
    "function_call": Unsupported(("none", "auto"), _NO_TOOLS),
    "modalities": Unsupported((["text"],), _TEXT_ALONE),
    "audio": Unsupported((), _TEXT_ALONE),
    "prediction": Unsupported((), _LEAVE_OUT),
    "reasoning_effort": Unsupported((), _LEAVE_OUT),
    "verbosity": Unsupported((), _LEAVE_OUT),
    "service_tier": Unsupported(("auto", "default"), _LEAVE_OUT),
    "store": Unsupported((False,), "leave it out: nothing is stored"),
    "metadata": Unsupported(({},), "leave it out: nothing is stored"),
    "web_search_options": Unsupported((), _LEAVE_OUT),
}


class Problem(NamedTuple):
    """What is wrong with one field."""

    param: str
    code: str
    message: str
    remedy: str


def checked(body: Mapping[str, object], rules: Mapping[str, Rule], *, within: str = "") -> dict[str, object]:
    """The fields that were given and mean something; null is the same as absent.

    Raises one `ApiError` for everything that is wrong, about the first field of that. `within` is the field whose
    value `body` is.
    """
    given = {name: value for name, value in body.items() if value is not None}
    problems = [problem for name, value in given.items() if (problem := _problem(name, value, rules, within))]
    if problems:
        raise summary(problems)
    return {name: value for name, value in given.items() if name in rules}


def summary(problems: list[Problem]) -> ApiError:
    """One refusal that names every problem."""
    first = problems[0]
    remedies = dict.fromkeys(problem.remedy for problem in problems)
    return ApiError(
        400,
        "; ".join(problem.message for problem in problems),
        remedy="; ".join(remedies),
        code=first.code,
        param=first.param,
    )


def missing(name: str, rule: Rule) -> ApiError:
    """The refusal of a request without a field that it needs."""
    return ApiError(
        400, f"{name} is missing", remedy=f"add {name}, which is {rule.words}", code="missing_field", param=name
    )


def _problem(name: str, value: object, rules: Mapping[str, Rule], within: str) -> Problem | None:
    param = f"{within}.{name}" if within else name
    if name in rules:
        rule = rules[name]
        if rule.holds(value):
            return None
        message = f"{param}={_shown(value)} must be {rule.words}"
        return Problem(param, "invalid_value", message, f"give {param} as that, or leave it out")
    unsupported = None if within else UNSUPPORTED.get(name)
    if unsupported is not None:
        if any(_is_same(value, neutral) for neutral in unsupported.neutral):
            return None
        message = f"{param}={_shown(value)} is not supported by this server"
        return Problem(param, "unsupported_field", message, f"{param}: {unsupported.remedy}")
    near = difflib.get_close_matches(name, rules, n=1, cutoff=0.7)
    hint = f"did you mean {near[0]}?" if near else f"leave it out; known here: {', '.join(sorted(rules))}"
    return Problem(param, "unknown_field", f"{_shown(param)} is not a field of this request", hint)


def _is_same(value: object, neutral: object) -> bool:
    """Equality that tells true from 1; 0 and 0.0 are the same number."""
    return isinstance(value, bool) == isinstance(neutral, bool) and value == neutral


def _shown(value: object) -> str:
    """A value as an error shows it, never longer than a line."""
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
