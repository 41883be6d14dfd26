"""SamplingParams: how one request chooses its tokens and when it ends."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import TypeGuard

from inference_shardformer.config.inference import SamplingDefaults
from inference_shardformer.errors import RequestError


@dataclass(frozen=True)
class ResolvedSampling:
    """Sampling with every value final; what the scheduler, the sampler and the other ranks see."""

    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    seed: int
    stop: tuple[str, ...]
    stop_token_ids: tuple[int, ...]
    ignore_eos: bool
    skip_special_tokens: bool

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token always wins."""
        return self.temperature == 0.0


@dataclass(frozen=True)
class SamplingParams:
    """How one request chooses its tokens and when it ends; `None` stands for the engine's default.

    `temperature` 0 is greedy; `top_k` 0 keeps every token. The draw depends on `seed` and the number of tokens
    generated so far, on nothing else: the same prompt with the same seed gives the same tokens in any company. A
    request without a seed gets one from the engine's seed and its number, so that equal prompts draw differently.
    Generation ends at an end-of-sequence token unless `ignore_eos`, at one of `stop_token_ids` (both stay in the
    token ids), at one of the texts in `stop` (the text ends before it), or after `max_new_tokens`.
    Raises `RequestError` that lists every invalid value.
    """

    max_new_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        violations = [violation for violation in self._violations() if violation]
        if violations:
            raise RequestError(
                f"SamplingParams: {'; '.join(violations)}", remedy="correct the values named above; None is the default"
            )
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", tuple(int(token_id) for token_id in self.stop_token_ids))

    def resolve(self, defaults: SamplingDefaults, *, seed: int = 0) -> ResolvedSampling:
        """Put the engine's defaults and its seed where this says nothing."""
        return ResolvedSampling(
            max_new_tokens=int(defaults.max_new_tokens if self.max_new_tokens is None else self.max_new_tokens),
            temperature=float(defaults.temperature if self.temperature is None else self.temperature),
            top_k=int(defaults.top_k if self.top_k is None else self.top_k),
            top_p=float(defaults.top_p if self.top_p is None else self.top_p),
            seed=int(seed if self.seed is None else self.seed),
            stop=tuple(self.stop),
            stop_token_ids=tuple(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
            skip_special_tokens=self.skip_special_tokens,
        )

    def _violations(self) -> list[str | None]:
        return [
            _integer("max_new_tokens", self.max_new_tokens, low=1),
            _number("temperature", self.temperature, "a finite number, at least 0", lambda value: value >= 0),
            _integer("top_k", self.top_k, low=0),
            _number("top_p", self.top_p, "a number above 0, at most 1", lambda value: 0 < value <= 1),
            _integer("seed", self.seed, low=0, below=2**63),
            _stop(self.stop),
            _stop_token_ids(self.stop_token_ids),
            _flag("ignore_eos", self.ignore_eos),
            _flag("skip_special_tokens", self.skip_special_tokens),
        ]


def _integer(name: str, value: object, *, low: int, below: int | None = None) -> str | None:
    if value is None or (_is_integer(value) and low <= value and (below is None or value < below)):
        return None
    bound = "" if below is None else f", below {below}"
    return f"{name}={value!r} must be an integer, at least {low}{bound}"


def _number(name: str, value: object, rule: str, holds: Callable[[float], bool]) -> str | None:
    if value is None:
        return None
    if isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value) and holds(float(value)):
        return None
    return f"{name}={value!r} must be {rule}"


def _stop(value: object) -> str | None:
    texts = [value] if isinstance(value, str) else value
    if isinstance(texts, Sequence) and all(isinstance(text, str) and text for text in texts):
        return None
    return f"stop={value!r} must be a text or a sequence of texts, none of them empty"


def _stop_token_ids(value: object) -> str | None:
    if isinstance(value, Sequence) and all(_is_integer(token_id) and token_id >= 0 for token_id in value):
        return None
    return f"stop_token_ids={value!r} must be a sequence of integers, each at least 0"


def _flag(name: str, value: object) -> str | None:
    return None if isinstance(value, bool) else f"{name}={value!r} must be True or False"


def _is_integer(value: object) -> TypeGuard[int]:
    return isinstance(value, Integral) and not isinstance(value, bool)
