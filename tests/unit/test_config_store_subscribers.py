"""Subscribers of the live configuration: order, veto, rollback, updates from within."""

from __future__ import annotations

import pytest
from config_stores import SEQS, TOKENS, TOP_K, Boom, in_thread

from inference_shardformer.config.store import MAX_QUEUED, QueuedUpdateError
from inference_shardformer.config.subscriptions import ConfigVeto
from inference_shardformer.config.violations import ConfigViolations
from inference_shardformer.errors import ConfigError, StateError


def test_subscribers_are_called_in_order_once_with_their_changes(store):
    calls = []
    for name, pattern in enumerate(["scheduler.*", TOP_K, "inference.sampling.top_?", "*"]):
        store.subscribe(pattern, lambda changes, name=name: calls.append((name, changes)))
    store.update({"sampling.top_k": 4, TOKENS: 9, SEQS: 8}, source="test")
    seqs, tokens, top_k = (SEQS, 64, 8, 1, "test"), (TOKENS, 2048, 9, 1, "test"), (TOP_K, 0, 4, 1, "test")
    assert calls == [(0, (seqs, tokens)), (1, (top_k,)), (2, (top_k,)), (3, (seqs, tokens, top_k))]
    calls.clear()
    store.update({SEQS: 9, TOKENS: 9})
    assert calls == [(0, ((SEQS, 8, 9, 2, "call"),)), (3, ((SEQS, 8, 9, 2, "call"),))]


@pytest.mark.parametrize(
    ("pattern", "remedy"),
    [
        ("inference.schedular.*", "did you mean inference.scheduler.*?"),
        ("scheduler", "did you mean inference.scheduler.*?"),
        ("sampling.topk", f"did you mean {TOP_K}?"),
        ("*.nothing", "name a path such as inference.scheduler.*"),
    ],
)
def test_a_pattern_without_a_field_is_refused(store, pattern, remedy):
    with pytest.raises(ConfigError) as caught:
        store.subscribe(pattern, print)
    assert caught.value.remedy == remedy


def test_callbacks_read_the_old_values_until_the_swap(store):
    seen = []

    def read(changes):
        seen.append((store[SEQS], store.current.epoch, changes[0].epoch, *in_thread(lambda: store.get(SEQS))))

    store.subscribe(SEQS, read)
    store.update({SEQS: 5})
    assert seen == [(64, 0, 1, 64)]
    assert store[SEQS] == 5


@pytest.mark.parametrize("error", [ConfigVeto("not now", remedy="wait"), Boom("bang"), KeyboardInterrupt()])
@pytest.mark.parametrize("call", ["update", "prepare"])
def test_a_refusal_leaves_everything_and_compensates_in_reverse(store, call, error):
    calls = []

    def refuse(changes):
        raise error

    for name in "ab":
        store.subscribe(
            SEQS,
            lambda changes, name=name: calls.append(name),
            on_rollback=lambda changes, name=name: calls.append((name, changes)),
        )
    unsubscribe = store.subscribe("scheduler.*", refuse, on_rollback=lambda changes: calls.append("never"))
    store.subscribe("*", lambda changes: calls.append("never"))
    before = store.current
    with pytest.raises(BaseException) as caught:
        getattr(store, call)({SEQS: 5})
    change = (SEQS, 64, 5, 1, "call")
    assert calls == ["a", "b", ("b", (change,)), ("a", (change,))]
    assert store.current is before
    if isinstance(error, Exception):
        assert caught.value.__cause__ is error
        assert "the subscriber of scheduler.*" in str(caught.value)
        assert "nothing was changed" in str(caught.value)
        assert isinstance(caught.value, ConfigVeto if isinstance(error, ConfigVeto) else ConfigError)
    else:
        assert caught.value is error
    if isinstance(error, ConfigVeto):
        assert (caught.value.reason, caught.value.remedy) == ("not now", "wait")
    unsubscribe()
    assert store.update({SEQS: 5}).epoch == 1


def test_a_failing_rollback_notice_stops_nobody_and_is_told(store):
    calls = []

    def fail(changes):
        raise Boom("cannot go back")

    def veto(changes):
        raise ConfigVeto("no")

    store.subscribe(SEQS, print, on_rollback=lambda changes: calls.append("first"))
    store.subscribe("*", lambda changes: None, on_rollback=fail)
    unsubscribe = store.subscribe(SEQS, veto)
    with pytest.raises(ConfigVeto, match=r"no; on_rollback of \* raised Boom: cannot go back"):
        store.update({SEQS: 5})
    unsubscribe()
    pending = store.prepare({SEQS: 5})
    with pytest.raises(ConfigError, match=r"was rolled back, but on_rollback of \* raised Boom"):
        store.rollback(pending)
    assert calls == ["first", "first"]
    assert store.update({SEQS: 6}).epoch == 1


def test_unsubscribing_and_subscribing_within_a_callback(store):
    calls = []
    drop = {}

    def first(changes):
        calls.append("first")
        drop["first"]()
        drop["third"]()
        drop["late"] = store.subscribe(SEQS, lambda changes: calls.append("late"))

    drop["first"] = store.subscribe(SEQS, first)
    store.subscribe(SEQS, lambda changes: calls.append("second"))
    drop["third"] = store.subscribe(SEQS, lambda changes: calls.append("third"))
    store.update({SEQS: 5})
    assert calls == ["first", "second"]
    store.update({SEQS: 6})
    assert calls == ["first", "second", "second", "late"]
    drop["late"]()
    drop["late"]()
    store.update({SEQS: 7})
    assert calls[4:] == ["second"]


def test_another_thread_may_subscribe_while_a_callback_waits_for_it(store):
    outcome = []
    store.subscribe(
        SEQS, lambda changes: outcome.extend(in_thread(lambda: store.subscribe("*", lambda changes: None)()))
    )
    assert store.update({SEQS: 5}).epoch == 1
    assert outcome == [None]


def test_a_re_entrant_update_is_queued_and_applied_afterwards_in_order(store):
    log = []

    def react(changes):
        [change] = changes
        log.append((change.path, change.new, change.epoch, change.source, store.current.epoch))
        if change.path == SEQS:
            assert store.update({TOKENS: change.new * 10}, source="react") is None
            assert store.update({TOP_K: change.new}, source="react") is None

    store.subscribe("*", react)
    snapshot = store.update({SEQS: 5})
    assert log == [(SEQS, 5, 1, "call", 0), (TOKENS, 50, 2, "react", 1), (TOP_K, 5, 3, "react", 2)]
    assert (snapshot.epoch, snapshot[SEQS], snapshot[TOKENS]) == (1, 5, 2048)
    assert (store.current.epoch, store[TOKENS], store[TOP_K]) == (3, 50, 5)


def test_a_prepared_update_applies_what_its_callbacks_queued_on_commit(store):
    store.subscribe(SEQS, lambda changes: store.update({TOKENS: changes[0].new * 10}))
    pending = store.prepare({SEQS: 5})
    assert store.current.epoch == 0
    assert store.commit(pending).epoch == 1
    assert (store.current.epoch, store[TOKENS]) == (2, 50)
    store.rollback(store.prepare({SEQS: 6}))
    assert store.update({TOP_K: 1}).epoch == 3
    assert (store.current.epoch, store[TOKENS]) == (3, 50), "what callbacks of a given-up update queued is dropped"


def test_what_callbacks_of_a_refused_update_queued_is_dropped(store):
    def veto(changes):
        raise ConfigVeto("no")

    store.subscribe(
        SEQS, lambda changes: store.update({TOP_K: 7}), on_rollback=lambda changes: store.update({TOP_K: 8})
    )
    store.subscribe(SEQS, veto)
    with pytest.raises(ConfigVeto):
        store.update({SEQS: 5})
    assert store.update({TOKENS: 9}).epoch == 1
    assert (store.current.epoch, store[TOP_K]) == (1, 0)


def test_a_refused_queued_update_is_told_and_the_others_apply(store):
    def queue(changes):
        store.update({TOP_K: -1})
        store.update({TOKENS: 77})
        with pytest.raises(ConfigViolations, match="init_only"):
            store.update({"cache.block_size": 8})

    store.subscribe(SEQS, queue)
    with pytest.raises(QueuedUpdateError, match="epoch 1 took effect") as caught:
        store.update({SEQS: 5})
    assert caught.value.snapshot[SEQS] == 5
    [failure] = caught.value.failures
    assert [violation.path for violation in failure.violations] == [TOP_K]
    assert (store[SEQS], store[TOKENS], store[TOP_K], store.current.epoch) == (5, 77, 0, 2)


def test_callbacks_that_never_agree_are_stopped(store):
    store.subscribe(TOP_K, lambda changes: store.update({TOP_K: changes[0].new + 1}))
    with pytest.raises(QueuedUpdateError, match=f"more than {MAX_QUEUED} updates"):
        store.update({TOP_K: 1})
    assert store.current.epoch == MAX_QUEUED + 1


@pytest.mark.parametrize("call", ["prepare", "commit", "rollback", "close"])
def test_other_writing_calls_are_illegal_within_a_callback(store, call):
    def write(changes):
        with pytest.raises(StateError, match="a callback of a running update may not"):
            getattr(store, call)(*([{SEQS: 6}] if call == "prepare" else [None] if call != "close" else []))

    store.subscribe(SEQS, write)
    assert store.update({SEQS: 5}).epoch == 1
