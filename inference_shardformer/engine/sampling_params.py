"""SamplingParams: how one request chooses its tokens and when it ends."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral, Real
from typing import TypeGuard, TypeVar

from inference_shardformer.config.inference import SamplingDefaults
from inference_shardformer.errors import RequestError

Value = TypeVar("Value")
Bias = Mapping[int, float] | Sequence[tuple[int, float]]
"""A number for some token ids."""

MAX_LOGPROBS = 128

_BEYOND = 2**63  # no number, length or token id is as large as this
_LONGEST_SHOWN = 256  # bits
_INTEGERS = ("max_new_tokens", "min_new_tokens", "top_k", "no_repeat_ngram_size", "seed", "logprobs", "prompt_logprobs")
_NUMBERS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")


@dataclass(frozen=True)
class ResolvedSampling:
    """Sampling with every value final; what the scheduler, the sampler and the other ranks see."""

    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    repetition_penalty: float
    no_repeat_ngram_size: int
    seed: int
    stop: tuple[str, ...]
    stop_token_ids: tuple[int, ...]
    ignore_eos: bool
    skip_special_tokens: bool
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_new_tokens: int = 0
    cache_salt: str | None = None

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token always wins."""
        return self.temperature == 0.0

    @cached_property
    def takes_likeliest(self) -> bool:
        """Whether the model's likeliest token wins, from the first to the last."""
        return self.is_greedy and not (self.looks_back or self.logit_bias or self.min_new_tokens)

    @property
    def looks_back(self) -> bool:
        """Whether the tokens so far change the logits of the next one."""
        return (
            self.repetition_penalty != 1.0
            or self.no_repeat_ngram_size > 0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )


@dataclass(frozen=True)
class SamplingParams:
    """How one request chooses its tokens and when it ends; `None` stands for the engine's default.

    `temperature` 0 is greedy; `top_k` 0 keeps every token. The draw depends on `seed` and the number of tokens
    generated so far, on nothing else: the same prompt with the same seed gives the same tokens in any company, but for
    rounding that depends on how steps and cached blocks cut the prompt. A request without a seed gets one from the
    engine's seed and its number, so that equal prompts draw differently.
    `repetition_penalty` above 1 makes tokens of the prompt and the output less likely, `no_repeat_ngram_size` n lets no
    sequence of n tokens occur twice in them; both as Hugging Face does it, before the temperature, greedy or not.
    `presence_penalty` is taken once from the logit of every token of the output, `frequency_penalty` as often as it
    occurs there, each from -2 to 2; `logit_bias` adds a number from -100 to 100 to the logits of tokens by their ids,
    before all penalties. These three as OpenAI has them. `min_p` keeps the tokens that have at least this share of the
    likeliest one's probability, before `top_k` and `top_p`.
    Generation ends at an end-of-sequence token unless `ignore_eos`, at one of `stop_token_ids` (both stay in the
    token ids), at one of the texts in `stop` (the text ends before it), or after `max_new_tokens`. Of the first
    `min_new_tokens` none is one that would end it, and no stop text is looked for in them.
    `logprobs` k brings the log-probability of each generated token and the k likeliest tokens in its place with theirs,
    k up to `MAX_LOGPROBS`; 0 brings the generated ones alone, `None` nothing. They are the model's own: the log-softmax
    in float32 of its logits before temperature, penalties and all else that this changes, so that they mean the same
    whatever the sampling, and can be compared between requests and with other programs. `prompt_logprobs` k brings the
    same of the prompt's tokens, each after those before it, in the finished output; their logits take memory, so that
    such a prompt runs in chunks of 256 tokens at most.
    Requests share blocks of the prefix cache with requests of the same `cache_salt` alone; so nobody can tell by the
    time to the first token what another one has asked.
    Raises `RequestError` that lists every invalid value.
    """

    max_new_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    seed: int | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool | None = None
    skip_special_tokens: bool = True
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Bias = ()
    min_new_tokens: int | None = None
    cache_salt: str | None = None

    def __post_init__(self) -> None:
        violations = [violation for violation in self._violations() if violation]
        if violations:
            raise RequestError(
                f"SamplingParams: {'; '.join(violations)}", remedy="correct the values named above; None is the default"
            )
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", tuple(int(token_id) for token_id in self.stop_token_ids))
        bias = tuple(sorted((int(token_id), float(number)) for token_id, number in _pairs(self.logit_bias)))
        object.__setattr__(self, "logit_bias", bias)
        for names, kind in ((_INTEGERS, int), (_NUMBERS, float)):  # plain numbers: they are sent to other ranks
            for name in names:
                value = getattr(self, name)
                object.__setattr__(self, name, None if value is None else kind(value))

    def resolve(self, defaults: SamplingDefaults, *, seed: int = 0) -> ResolvedSampling:
        """Put the engine's defaults and its seed where this says nothing."""
        return ResolvedSampling(
            max_new_tokens=_given(self.max_new_tokens, defaults.max_new_tokens),
            temperature=_given(self.temperature, defaults.temperature),
            top_k=_given(self.top_k, defaults.top_k),
            top_p=_given(self.top_p, defaults.top_p),
            repetition_penalty=_given(self.repetition_penalty, defaults.repetition_penalty),
            no_repeat_ngram_size=_given(self.no_repeat_ngram_size, defaults.no_repeat_ngram_size),
            seed=_given(self.seed, seed),
            stop=tuple(self.stop),
            stop_token_ids=tuple(self.stop_token_ids),
            ignore_eos=_given(self.ignore_eos, defaults.ignore_eos),
            skip_special_tokens=self.skip_special_tokens,
            logprobs=self.logprobs,
            prompt_logprobs=self.prompt_logprobs,
            min_p=_given(self.min_p, 0.0),
            presence_penalty=_given(self.presence_penalty, 0.0),
            frequency_penalty=_given(self.frequency_penalty, 0.0),
            logit_bias=tuple(_pairs(self.logit_bias)),
            min_new_tokens=_given(self.min_new_tokens, 0),
            cache_salt=self.cache_salt,
        )

    def _violations(self) -> list[str | None]:
        return [
            _integer("max_new_tokens", self.max_new_tokens, low=1),
            _number("temperature", self.temperature, "a finite number, at least 0", lambda value: value >= 0),
            _integer("top_k", self.top_k, low=0),
            _number("top_p", self.top_p, "a number above 0, at most 1", lambda value: 0 < value <= 1),
            _number("repetition_penalty", self.repetition_penalty, "a finite number above 0", lambda value: value > 0),
            _integer("no_repeat_ngram_size", self.no_repeat_ngram_size, low=0),
            _integer("seed", self.seed, low=0),
            _stop(self.stop),
            _stop_token_ids(self.stop_token_ids),
            None if self.ignore_eos is None else _flag("ignore_eos", self.ignore_eos),
            _flag("skip_special_tokens", self.skip_special_tokens),
            _integer("logprobs", self.logprobs, low=0, below=MAX_LOGPROBS + 1),
            _integer("prompt_logprobs", self.prompt_logprobs, low=0, below=MAX_LOGPROBS + 1),
            _number("min_p", self.min_p, "a number from 0 to 1", lambda value: 0 <= value <= 1),
            _number("presence_penalty", self.presence_penalty, "a number from -2 to 2", lambda value: abs(value) <= 2),
            _number(
                "frequency_penalty", self.frequency_penalty, "a number from -2 to 2", lambda value: abs(value) <= 2
            ),
            _logit_bias(self.logit_bias),
            _integer("min_new_tokens", self.min_new_tokens, low=0),
            _salt(self.cache_salt),
        ]


def _given(value: Value | None, default: Value) -> Value:
    return default if value is None else value


def _integer(name: str, value: object, *, low: int, below: int = _BEYOND) -> str | None:
    if value is None or (_is_integer(value) and low <= value < below):
        return None
    return f"{name}={shown(value)} must be an integer, at least {low}, below {below}"


def shown(value: object) -> str:
    """A value as a message shows it; Python itself refuses to write integers of thousands of digits."""
    if isinstance(value, int) and value.bit_length() > _LONGEST_SHOWN:
        return f"<an integer of {value.bit_length()} bits>"
    return repr(value)


def _number(name: str, value: object, rule: str, holds: Callable[[float], bool]) -> str | None:
    if value is None:
        return None
    if isinstance(value, Real) and not isinstance(value, bool):
        with suppress(OverflowError):  # whole numbers and fractions may be larger than any float
            if math.isfinite(value) and holds(float(value)):
                return None
    return f"{name}={shown(value)} must be {rule}"


def _stop(value: object) -> str | None:
    texts = [value] if isinstance(value, str) else value
    if isinstance(texts, Sequence) and all(isinstance(text, str) and text for text in texts):
        return None
    return f"stop={value!r} must be a text or a sequence of texts, none of them empty"


def _stop_token_ids(value: object) -> str | None:
    token_ids = value if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray) else (value,)
    if token_ids is value and all(_is_integer(token_id) and 0 <= token_id < _BEYOND for token_id in token_ids):
        return None
    return f"stop_token_ids={shown(value)} must be a sequence of integers, each at least 0"


def _logit_bias(value: Bias) -> str | None:
    if isinstance(value, Mapping | Sequence) and not isinstance(value, str):
        pairs = _pairs(value)
        are_pairs = all(isinstance(pair, Sequence) and len(pair) == 2 and _is_bias(*pair) for pair in pairs)
        if are_pairs and len({token_id for token_id, _ in pairs}) == len(pairs):
            return None
    return f"logit_bias={shown(value)} must be numbers from -100 to 100 for token ids, each at least 0 and there once"


def _pairs(bias: Bias) -> Sequence[tuple[int, float]]:
    return list(bias.items()) if isinstance(bias, Mapping) else bias


def _is_bias(token_id: object, number: object) -> bool:
    is_in_range = number is not None and _number("", number, "", lambda value: abs(value) <= 100) is None
    return is_in_range and _is_integer(token_id) and 0 <= token_id < _BEYOND


def _salt(value: object) -> str | None:
    if value is None or (isinstance(value, str) and value):
        return None
    return f"cache_salt={value!r} must be a text that is not empty"


def _flag(name: str, value: object) -> str | None:
    return None if isinstance(value, bool) else f"{name}={value!r} must be True or False"


def _is_integer(value: object) -> TypeGuard[int]:
    return isinstance(value, Integral) and not isinstance(value, bool)
