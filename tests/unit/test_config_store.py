"""The live configuration: one value in three spellings, what may change, two stores, closing."""

from __future__ import annotations

import dataclasses
import gc
import threading
import weakref
from operator import attrgetter

import pytest
from config_stores import DECIDED, LENGTH, SEQS, TEMPERATURE, TOKENS, TOP_K, TOP_P, Boom, in_thread, resolved
from pydantic import Field

from inference_shardformer.config import mutability
from inference_shardformer.config.fields import all_fields
from inference_shardformer.config.mutability import is_live, mutability_of, why_init_only
from inference_shardformer.config.resolved import ResolvedConfig
from inference_shardformer.config.snapshot import UnknownSettingError
from inference_shardformer.config.store import ConfigStore
from inference_shardformer.config.violations import ConfigViolations
from inference_shardformer.errors import ConfigError, StateError


def test_three_spellings_give_one_value_for_every_field(store):
    assert list(store) == list(all_fields())
    assert len(store) == len(all_fields())
    for path in store:
        by_attribute = attrgetter(path)(store)
        short = path.split(".", 1)[1]
        for value in (store.get(path), store.get(short), store[path], store[short], dict(store.current)[path]):
            assert value == by_attribute
            assert type(value) is type(by_attribute)
        assert path in store
        assert short in store.current


def test_what_was_decided_never_reads_auto(store):
    for path, (_, value) in DECIDED.items():
        assert store[path] == value
    assert store.current.config.inference.dtype == "auto"


def test_every_decided_value_of_a_resolved_config_is_read_through_the_store():
    known = {"shard", "inference", "decisions", "kernels", *(name for name, _ in DECIDED.values())}
    assert {field.name for field in dataclasses.fields(ResolvedConfig)} == known


@pytest.mark.parametrize(
    ("read", "remedy"),
    [
        (lambda store: store.get("cache.blok_size"), "did you mean inference.cache.block_size?"),
        (lambda store: store["inference.schedular.max_num_seqs"], f"did you mean {SEQS}?"),
        (lambda store: store.inferense, "did you mean inference?"),
        (lambda store: store.current["scheduler"], f"name one, for example {SEQS}"),
        (lambda store: store.get("wholly different"), "`describe()` lists the settings"),
        (lambda store: store[3], "`describe()` lists the settings"),
    ],
)
def test_unknown_names_are_errors_with_a_suggestion(store, read, remedy):
    with pytest.raises(UnknownSettingError) as caught:
        read(store)
    assert caught.value.remedy == remedy
    assert isinstance(caught.value, ConfigError)


def test_unknown_names_behave_like_missing_ones(store):
    assert not hasattr(store, "schedular")
    assert "schedular.max_num_seqs" not in store
    assert 3 not in store
    with pytest.raises(KeyError):
        store["schedular.x"]
    with pytest.raises(AttributeError):
        store.__deepcopy__  # noqa: B018


def test_a_store_and_its_snapshots_are_read_only(store):
    with pytest.raises(AttributeError):
        store.current = None
    with pytest.raises(dataclasses.FrozenInstanceError):
        store.current.epoch = 7
    with pytest.raises(ValueError, match="frozen"):
        store.inference.scheduler.max_num_seqs = 7


def test_describe_lists_every_field_with_its_state(store):
    store.update({"scheduler.max_num_seqs": 5}, source="autotuner")
    states = {state.path: state for state in store.describe()}
    assert list(states) == list(all_fields())
    assert states[SEQS] == (SEQS, 5, "live", "update of epoch 1, source autotuner", "")
    assert states[TOKENS] == (TOKENS, 2048, "live", "default", "because")
    bare = ConfigStore(dataclasses.replace(resolved(), decisions=()))
    assert bare.describe()[0].origin == ""


def test_mutability_is_declared_on_the_fields():
    declared = {path: mutability_of(path) for path in all_fields()}
    guesses = {f"inference.scheduler.{name}" for name in ("speculation", "max_draft_tokens")}
    assert {path for path, kind in declared.items() if kind == "live"} == {SEQS, TOKENS} | guesses
    penalties = {f"inference.sampling.{name}" for name in ("repetition_penalty", "no_repeat_ngram_size", "ignore_eos")}
    per_request = {LENGTH, TEMPERATURE, TOP_K, TOP_P, *penalties}
    assert {path for path, kind in declared.items() if kind == "per_request"} == per_request
    assert not any(is_live(path) for path in DECIDED), "the store changes what was asked, which must be what holds"
    with pytest.raises(ConfigError, match=r"cache\.block: no such field"):
        mutability_of("cache.block")


def test_a_misspelt_declaration_is_refused(monkeypatch):
    monkeypatch.setattr(mutability, "_field_info", lambda path: Field(json_schema_extra={"mutability": "alive"}))
    with pytest.raises(ConfigError, match="mutability='alive'"):
        mutability_of.__wrapped__("inference.seed")


@pytest.mark.parametrize("path", [path for path in all_fields() if not is_live(path)])
def test_init_only_fields_refuse_with_the_reason(store, path):
    before = store.current
    with pytest.raises(ConfigViolations) as caught:
        store.update({path: store[path], "scheduler.max_num_seqs": 3})
    [violation] = caught.value.violations
    assert violation.path == path
    assert violation.rule == f"set before the engine is built (init_only): {why_init_only(path)}"
    assert "built with it" not in violation.rule, "every field tells its own reason"
    assert store.current is before


def test_closed_means_closed(store):
    unsubscribe = store.subscribe("*", print)
    snapshot = store.current
    pending = store.prepare({SEQS: 5})
    store.close()
    store.close()
    unsubscribe()
    accesses = [
        lambda: store.current,
        lambda: store.inference,
        lambda: store.shard,
        lambda: store.get(SEQS),
        lambda: store[SEQS],
        lambda: SEQS in store,
        lambda: list(store),
        lambda: len(store),
        lambda: store.describe(),
        lambda: store.anything,
        lambda: store.update({SEQS: 5}),
        lambda: store.prepare({SEQS: 5}),
        lambda: store.commit(pending),
        lambda: store.rollback(pending),
        lambda: store.subscribe("*", print),
    ]
    for access in accesses:
        with pytest.raises(StateError, match="this configuration store is closed"):
            access()
    assert repr(store) == "<ConfigStore closed>"
    assert snapshot[SEQS] == 64


def test_closing_rolls_a_prepared_update_back_and_wakes_who_waits(store):
    calls, results = [], []
    store.subscribe(SEQS, print, on_rollback=lambda changes: calls.append("undone"))
    store.prepare({SEQS: 5})
    thread = threading.Thread(target=lambda: results.extend(in_thread(lambda: store.update({TOKENS: 9}))))
    thread.start()
    thread.join(0.05)
    store.close()
    thread.join(10)
    assert calls == ["undone"]
    assert [type(error) for error in results] == [StateError]
    assert "closed" in str(results[0])


def test_a_failing_notice_does_not_stop_closing(store):
    def fail(changes):
        raise Boom("cannot go back")

    store.subscribe(SEQS, print, on_rollback=fail)
    store.prepare({SEQS: 5})
    with pytest.raises(ConfigError, match="cannot go back"):
        store.close()
    assert repr(store) == "<ConfigStore closed>"


def test_subscribing_while_another_thread_closes(store, monkeypatch):
    add = type(store._subscriptions).add

    def close_first(self, subscription):
        store.close()
        add(self, subscription)

    monkeypatch.setattr(type(store._subscriptions), "add", close_first)
    with pytest.raises(StateError, match="closed"):
        store.subscribe("*", print)
    assert store._subscriptions._entries == ()


class Engine:
    def __init__(self) -> None:
        self.store = ConfigStore(resolved())
        self.unsubscribe = self.store.subscribe("*", self.changed, on_rollback=self.changed)

    def changed(self, changes) -> None:
        self.last = changes


def test_nothing_leaks_after_closing():
    engine = Engine()
    engine.store.update({SEQS: 5})
    pending = engine.store.prepare({SEQS: 6})
    held, unsubscribe = engine.store, engine.unsubscribe
    held.close()
    dead_engine = weakref.ref(engine)
    del engine
    gc.collect()
    assert dead_engine() is None, "a closed store, its handles and its pending update hold no callback"
    dead_store = weakref.ref(held)
    del held
    gc.collect()
    assert dead_store() is None, "what outlives the store does not hold it"
    unsubscribe()
    assert pending.snapshot[SEQS] == 6
