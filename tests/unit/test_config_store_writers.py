"""Writers of the live configuration: prepared updates, several threads, no deadlock."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
from config_stores import SEQS, TOKENS, in_thread, resolved

from inference_shardformer.config.store import ConfigStore
from inference_shardformer.errors import StateError


def test_a_prepared_update_takes_effect_on_commit_alone(store):
    calls = []
    store.subscribe(SEQS, lambda changes: calls.append("told"), on_rollback=lambda changes: calls.append("undone"))
    pending = store.prepare({SEQS: 5}, source="rank 0")
    assert pending.changes == ((SEQS, 64, 5, 1, "rank 0"),)
    assert (store[SEQS], pending.snapshot[SEQS]) == (64, 5)
    store.rollback(pending)
    assert (store[SEQS], store.current.epoch, calls) == (64, 0, ["told", "undone"])
    pending = store.prepare({SEQS: 5})
    assert in_thread(lambda: store.commit(pending)) == [pending.snapshot]
    assert (store[SEQS], store.current.epoch) == (5, 1)


def test_only_the_prepared_update_can_be_ended_and_only_once(store):
    other = ConfigStore(resolved())
    foreign = other.prepare({SEQS: 5})
    with pytest.raises(StateError, match="not the prepared update"):
        store.commit(foreign)
    pending = store.prepare({SEQS: 5})
    with pytest.raises(StateError, match="not the prepared update"):
        store.rollback(foreign)
    store.commit(pending)
    for end in (store.commit, store.rollback):
        with pytest.raises(StateError, match="has ended"):
            end(pending)
    assert (store.current.epoch, other.current.epoch) == (1, 0)


def test_the_thread_that_prepared_gets_an_error_instead_of_a_deadlock(store):
    pending = store.prepare({SEQS: 5})
    started = time.monotonic()
    for call in (store.update, store.prepare):
        with pytest.raises(StateError, match="neither committed nor rolled back"):
            call({SEQS: 6})
    assert time.monotonic() - started < 25, "at once, not after waiting for itself"
    assert store.commit(pending)[SEQS] == 5


def test_another_thread_waits_for_the_prepared_update(store):
    pending = store.prepare({SEQS: 5})
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(store.update({TOKENS: 9})))
    thread.start()
    thread.join(0.05)
    assert thread.is_alive()
    store.commit(pending)
    thread.join(10)
    assert [(snapshot.epoch, snapshot[SEQS]) for snapshot in results] == [(2, 5)]


def test_waiting_for_a_forgotten_update_ends():
    store = ConfigStore(resolved(), wait_s=0.05)
    pending = store.prepare({SEQS: 5})
    [error] = in_thread(lambda: store.update({SEQS: 6}))
    assert isinstance(error, StateError)
    assert "'MainThread', which prepared an update that is neither" in str(error)
    assert store.commit(pending).epoch == 1


def test_a_callback_that_waits_for_another_writer_ends_in_an_error():
    store = ConfigStore(resolved(), wait_s=0.05)
    outcome = []
    store.subscribe(SEQS, lambda changes: outcome.extend(in_thread(lambda: store.update({TOKENS: 9}))))
    assert store.update({SEQS: 5}).epoch == 1
    assert [type(error) for error in outcome] == [StateError]
    assert "'MainThread', which is updating" in str(outcome[0])
    assert (store[TOKENS], store.current.epoch) == (2048, 1)
