"""Random transactions on a live configuration agree with a plain dictionary."""

from __future__ import annotations

from typing import Any

import pytest
from config_stores import LENGTH, SEQS, TEMPERATURE, TOKENS, TOP_K, TOP_P, Boom, resolved
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from inference_shardformer.config.fields import all_fields
from inference_shardformer.config.store import ConfigStore
from inference_shardformer.config.subscriptions import ConfigVeto
from inference_shardformer.config.violations import ConfigViolations
from inference_shardformer.errors import ConfigError

LEGAL = {
    SEQS: lambda value: type(value) is int and 1 <= value <= 65536,
    TOKENS: lambda value: type(value) is int and value >= 1,
    LENGTH: lambda value: type(value) is int and value >= 1,
    TOP_K: lambda value: type(value) is int and value >= 0,
    TEMPERATURE: lambda value: type(value) in (int, float) and 0 <= value <= 100,
    TOP_P: lambda value: type(value) in (int, float) and 0 < value <= 1,
}
PATTERNS = {
    "scheduler.*": {SEQS, TOKENS},
    SEQS: {SEQS},
    "inference.sampling.t*": {TOP_K, TEMPERATURE, TOP_P},
    "*.max_*": {SEQS, TOKENS, LENGTH},
    "*": set(LEGAL),
}
VALUES = st.sampled_from([1, 1, 2, 2, 3, 0.5, 1.0, 0, -1, 65537, "3", True, None])
ASSIGNMENTS = st.dictionaries(st.sampled_from([*LEGAL, *LEGAL, "inference.seed", "sampling.top_z"]), VALUES, max_size=3)


class StoreMachine(RuleBasedStateMachine):
    """A store beside a plain dictionary, a counter, and a list of who must be called."""

    def __init__(self) -> None:
        super().__init__()
        self.store = ConfigStore(resolved())
        self.values = {path: self.store[path] for path in LEGAL}
        self.epoch = 0
        self.subscribers: list[tuple[int, str, str, Any]] = []
        self.calls: list[tuple[str, int, tuple[str, ...]]] = []
        self.count = 0

    @rule(pattern=st.sampled_from(sorted(PATTERNS)), mood=st.sampled_from(["glad", "glad", "glad", "veto", "raise"]))
    def subscribe(self, pattern, mood):
        name = self.count
        self.count += 1

        def callback(changes):
            assert {path: self.store[path] for path in LEGAL} == self.values
            assert all(change.old == self.values[change.path] for change in changes)
            assert {change.epoch for change in changes} == {self.epoch + 1}
            if mood == "veto":
                raise ConfigVeto("no")
            if mood == "raise":
                raise Boom("bang")
            self.calls.append(("told", name, tuple(change.path for change in changes)))

        def on_rollback(changes):
            self.calls.append(("undone", name, tuple(change.path for change in changes)))

        unsubscribe = self.store.subscribe(pattern, callback, on_rollback=on_rollback)
        self.subscribers.append((name, pattern, mood, unsubscribe))

    @rule(position=st.integers(0, 5))
    def unsubscribe(self, position):
        if position < len(self.subscribers):
            self.subscribers.pop(position)[3]()

    @rule(assignments=ASSIGNMENTS, way=st.sampled_from(["update", "commit", "rollback"]))
    def write(self, assignments, way):
        legal = all(path in LEGAL and LEGAL[path](value) for path, value in assignments.items())
        changed = {path: value for path, value in assignments.items() if legal and self.values[path] != value}
        told: list[tuple[int, tuple[str, ...]]] = []
        refusal = None
        for name, pattern, mood, _ in self.subscribers:
            hears = tuple(path for path in all_fields() if path in changed and path in PATTERNS[pattern])
            if hears and mood != "glad":
                refusal = ConfigVeto if mood == "veto" else ConfigError
                break
            if hears:
                told.append((name, hears))
        expected = [("told", *entry) for entry in told]
        if refusal or way == "rollback":
            expected += [("undone", *entry) for entry in reversed(told)]
        self.calls.clear()
        error = ConfigViolations if not legal else refusal
        if error:
            with pytest.raises(ConfigError) as caught:
                self.attempt(assignments, way)
            assert type(caught.value) is error
        else:
            self.attempt(assignments, way)
        assert self.calls == (expected if legal else [])
        if not error and way != "rollback" and changed:
            self.values.update(changed)
            self.epoch += 1

    def attempt(self, assignments, way) -> None:
        if way == "update":
            assert self.store.update(assignments) is self.store.current
        elif way == "commit":
            assert self.store.commit(self.store.prepare(assignments)) is self.store.current
        else:
            self.store.rollback(self.store.prepare(assignments))

    @invariant()
    def agrees(self):
        assert {path: self.store[path] for path in LEGAL} == self.values
        assert self.store.current.epoch == self.epoch


StoreMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=20, deadline=None)
test_transactions_agree_with_an_oracle = StoreMachine.TestCase
