"""Updates of the live configuration: validated as a whole, encoded for the other ranks."""

from __future__ import annotations

from typing import Annotated

import pytest
from config_stores import LENGTH, SEQS, TEMPERATURE, TOKENS, TOP_K, TOP_P, resolved
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, model_validator

from inference_shardformer.config.changes import decode_changes, encode_changes
from inference_shardformer.config.fields import all_fields
from inference_shardformer.config.inference import InferenceConfig, SchedulerConfig
from inference_shardformer.config.store import ConfigStore
from inference_shardformer.config.violations import ConfigViolations
from inference_shardformer.errors import ConfigError


def test_an_update_changes_several_fields_as_one_epoch(store):
    before = store.current
    after = store.update({"scheduler.max_num_seqs": 5, TEMPERATURE: 1})
    assert after is store.current
    assert (before.epoch, after.epoch) == (0, 1)
    assert (before[SEQS], before[TEMPERATURE]) == (64, 0.0)
    assert (after[SEQS], after[TEMPERATURE]) == (5, 1.0)
    assert type(after[TEMPERATURE]) is float
    assert after.config.inference.scheduler.max_num_seqs == 5
    assert {path: value for path, value in after.items() if value != before[path]} == {SEQS: 5, TEMPERATURE: 1.0}


def test_all_violations_are_reported_at_once_and_nothing_changes(store):
    before = store.current
    with pytest.raises(ConfigViolations) as caught:
        store.update(
            {
                "scheduler.max_num_seqs": 5,
                SEQS: 6,
                "sampling.top_p": 1.5,
                TOP_K: "many",
                TEMPERATURE: float("nan"),
                "samplin.top_k": 3,
                "cache.block_size": 8,
                "attention.options.toy.tile": 8,
                "sampling": 3,
            },
            source="console",
        )
    rules = {violation.path: violation.rule for violation in caught.value.violations}
    assert rules == {
        SEQS: "given once, and 5 is given too",
        TOP_P: all_fields()[TOP_P].rule,
        TOP_K: all_fields()[TOP_K].rule,
        TEMPERATURE: all_fields()[TEMPERATURE].rule,
        "samplin.top_k": "the name of a known setting",
        "inference.cache.block_size": "set before the engine is built (init_only): "
        "the cache tensors are already allocated",
        "inference.attention.options.toy.tile": rules["inference.attention.options.toy.tile"],
        "inference.sampling": "a group of settings: ignore_eos, max_new_tokens, "
        "no_repeat_ngram_size, repetition_penalty, temperature, top_k, top_p",
    }
    assert rules["inference.attention.options.toy.tile"].startswith("set before the engine is built (init_only): ")
    assert all(str(violation.origin).endswith("source console") for violation in caught.value.violations)
    assert "top_p = 1.5" in str(caught.value)
    assert store.current is before


class LinkedScheduler(SchedulerConfig):
    max_num_batched_tokens: Annotated[int, Field(strict=True, ge=1)] | Annotated[float, Field(strict=True, ge=1)] = 2048

    @model_validator(mode="after")
    def _room_for_each(self) -> LinkedScheduler:
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError("max_num_batched_tokens at least max_num_seqs")
        return self


class LinkedInference(InferenceConfig):
    scheduler: LinkedScheduler = LinkedScheduler()

    @model_validator(mode="after")
    def _within_context(self) -> LinkedInference:
        if self.max_model_len != "auto" and self.sampling.max_new_tokens > self.max_model_len:
            raise ValueError("max_new_tokens at most max_model_len")
        return self


def test_rules_between_fields_judge_the_whole_transaction():
    store = ConfigStore(resolved(LinkedInference()))
    with pytest.raises(ConfigViolations) as caught:
        store.update({TOKENS: 10})
    [violation] = caught.value.violations
    assert (violation.path, violation.given) == ("inference.scheduler", f"{TOKENS} = 10")
    assert violation.rule == "max_num_batched_tokens at least max_num_seqs"
    assert store.update({TOKENS: 10, SEQS: 10})[TOKENS] == 10
    assert store.update({SEQS: 100, TOKENS: 100}).epoch == 2


def test_a_field_of_several_kinds_is_one_violation():
    store = ConfigStore(resolved(LinkedInference()))
    with pytest.raises(ConfigViolations) as caught:
        store.update({TOKENS: "x", SEQS: 0})
    assert [violation.path for violation in caught.value.violations] == [SEQS, TOKENS]


def test_rules_between_fields_hold_for_what_was_decided():
    store = ConfigStore(resolved(LinkedInference()))
    assert store.current.config.inference.max_model_len == "auto"
    with pytest.raises(ConfigViolations, match="max_new_tokens at most max_model_len"):
        store.update({LENGTH: 129})
    assert store.update({LENGTH: 128}).epoch == 1
    asked = LinkedInference.model_validate({"sampling": {"max_new_tokens": 500}})
    with pytest.raises(ConfigViolations, match="max_new_tokens at most max_model_len"):
        ConfigStore(resolved(asked))


def test_an_update_without_effect_makes_no_epoch_and_calls_nobody(store):
    store.subscribe("*", lambda changes: pytest.fail("called"))
    before = store.current
    assert store.update({}) is before
    assert store.update({SEQS: 64, TEMPERATURE: 0}) is before
    assert store.commit(store.prepare({SEQS: 64})) is before
    assert store.current is before


def test_two_stores_never_see_each_other():
    config = resolved()
    one, two = ConfigStore(config), ConfigStore(config)
    two.subscribe("*", lambda changes: pytest.fail("called"))
    one.update({SEQS: 5})
    one.close()
    assert (two.current.epoch, two[SEQS]) == (0, 64)


TEXTS = st.text(st.sampled_from('aZ0 é"\\\n\u2028\U0001f600\ud800'), max_size=5)
SCALARS = st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS


@given(st.dictionaries(st.sampled_from(sorted(all_fields())), SCALARS))
def test_encoded_changes_come_back_as_they_were(changes):
    decoded = decode_changes(encode_changes(changes))
    assert decoded == changes
    assert {path: type(value) for path, value in decoded.items()} == {
        path: type(value) for path, value in changes.items()
    }
    assert encode_changes(dict(reversed(changes.items()))) == encode_changes(changes)


def test_changes_are_encoded_under_their_full_names():
    assert encode_changes({"sampling.top_k": 3}) == b'{"inference.sampling.top_k":3}'


@pytest.mark.parametrize("changes", [{TOP_K: object()}, {TEMPERATURE: float("inf")}, {TOP_K: 1, "sampling.top_k": 2}])
def test_changes_that_cannot_travel_are_refused(changes):
    with pytest.raises(ConfigError):
        encode_changes(changes)


@pytest.mark.parametrize("payload", [b"{", b"[1]", b'{"a": NaN}', b"\xff", b""])
def test_other_bytes_are_refused(payload):
    with pytest.raises(ConfigError, match="not an encoded update"):
        decode_changes(payload)
