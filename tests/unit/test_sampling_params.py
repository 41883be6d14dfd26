"""SamplingParams: what is refused, and how the engine's defaults fill in."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

from inference_shardformer.config.inference import SamplingDefaults
from inference_shardformer.engine.sampling_params import SamplingParams
from inference_shardformer.errors import RequestError


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0),
        ("max_new_tokens", -1),
        ("max_new_tokens", True),
        ("max_new_tokens", 1.5),
        ("max_new_tokens", "8"),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", Fraction(10**400)),
        ("temperature", True),
        ("temperature", "hot"),
        ("top_k", -1),
        ("top_k", False),
        ("top_k", 2.0),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", math.nan),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", -1.0),
        ("repetition_penalty", math.inf),
        ("repetition_penalty", "1.2"),
        ("no_repeat_ngram_size", -1),
        ("no_repeat_ngram_size", 2.0),
        ("seed", -1),
        ("seed", 2**63),
        ("top_k", 2**63),
        ("stop", ""),
        ("stop", ["a", ""]),
        ("stop", 3),
        ("stop", [3]),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", [True]),
        ("stop_token_ids", 7),
        ("stop_token_ids", "7"),
        ("stop_token_ids", b"7"),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("min_p", "0.1"),
        ("presence_penalty", 2.1),
        ("presence_penalty", True),
        ("frequency_penalty", -2.1),
        ("frequency_penalty", math.nan),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {1: 101.0}),
        ("logit_bias", {1: math.nan}),
        ("logit_bias", {1: None}),
        ("logit_bias", {"1": 1.0}),
        ("logit_bias", [(1, 2.0), (1, 3.0)]),
        ("logit_bias", [(1,)]),
        ("logit_bias", [7]),
        ("logit_bias", "12"),
        ("logit_bias", 3),
        ("logit_bias", None),
        ("min_new_tokens", -1),
        ("min_new_tokens", 1.0),
        ("ignore_eos", 1),
        ("skip_special_tokens", None),
    ],
)
def test_bad_value_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{name: value})
    assert f"{name}={value!r} must be" in str(caught.value)
    assert caught.value.remedy


def test_a_number_too_long_to_write_is_refused_all_the_same() -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(max_new_tokens=10**5000, temperature=10**400)
    assert "max_new_tokens=<an integer of 16610 bits> must be" in str(caught.value)
    assert "temperature=<an integer of 1329 bits> must be" in str(caught.value)


def test_all_violations_come_at_once() -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(temperature=-1.0, top_p=2.0, max_new_tokens=0)
    assert all(name in str(caught.value) for name in ("temperature=-1.0", "top_p=2.0", "max_new_tokens=0"))


def test_nothing_given_is_the_default_of_the_engine() -> None:
    defaults = SamplingDefaults(max_new_tokens=5, temperature=0.5, top_k=3, top_p=0.9)
    resolved = SamplingParams().resolve(defaults, seed=11)
    assert (resolved.max_new_tokens, resolved.temperature, resolved.top_k, resolved.top_p) == (5, 0.5, 3, 0.9)
    assert resolved.seed == 11
    assert not resolved.is_greedy


def test_what_is_given_wins_even_where_it_is_zero() -> None:
    params = SamplingParams(max_new_tokens=2, temperature=0, top_k=0, top_p=1, seed=0)
    resolved = params.resolve(SamplingDefaults(temperature=0.5, top_k=3, top_p=0.9), seed=11)
    assert (resolved.max_new_tokens, resolved.temperature, resolved.top_k, resolved.top_p) == (2, 0.0, 0, 1.0)
    assert resolved.seed == 0
    assert resolved.is_greedy


def test_sequences_and_numpy_scalars_are_normalised() -> None:
    params = SamplingParams(stop="end", stop_token_ids=[np.int64(3)], top_k=np.int32(4), temperature=np.float32(0.5))
    resolved = params.resolve(SamplingDefaults())
    assert resolved.stop == ("end",)
    assert resolved.stop_token_ids == (3,)
    assert type(resolved.stop_token_ids[0]) is int
    assert type(resolved.top_k) is int
    assert type(resolved.temperature) is float
    biased = SamplingParams(logit_bias={np.int64(7): 1, 3: np.float32(-2)})
    assert biased.logit_bias == ((3, -2.0), (7, 1.0))
    assert biased == SamplingParams(logit_bias=[[7, 1.0], [3, -2.0]])  # as it comes from another rank
    assert hash(params) == hash(SamplingParams(stop=["end"], stop_token_ids=(3,), top_k=4, temperature=0.5))
