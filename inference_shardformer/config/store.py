"""ConfigStore: the live configuration of one engine, read without locks and changed by transactions."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from inference_shardformer.config.changes import PendingUpdate
from inference_shardformer.config.inference import InferenceConfig
from inference_shardformer.config.resolved import ResolvedConfig
from inference_shardformer.config.shard import ShardConfig
from inference_shardformer.config.snapshot import ConfigSnapshot, SettingState, unknown_setting
from inference_shardformer.config.subscriptions import (
    ChangeCallback,
    Notice,
    Subscription,
    Subscriptions,
    retract,
)
from inference_shardformer.config.transactions import check_names, first_snapshot, plan_decision, plan_update
from inference_shardformer.config.turn import WriterTurn
from inference_shardformer.errors import ConfigError, StateError

MAX_QUEUED = 1000


class QueuedUpdateError(ConfigError):
    """An update took effect, but updates that its callbacks asked for did not. `snapshot` is what took effect."""

    code = "config_queued"

    def __init__(self, snapshot: ConfigSnapshot, failures: tuple[ConfigError, ...]) -> None:
        reasons = "\n".join(f"- {failure.message}" for failure in failures)
        super().__init__(
            f"epoch {snapshot.epoch} took effect, but updates that callbacks had queued were refused:\n{reasons}",
            remedy="correct the callbacks that call update()",
        )
        self.snapshot = snapshot
        self.failures = failures


class _Queued(NamedTuple):
    changes: Mapping[str, object]
    source: str


class ConfigStore:
    """The configuration of one engine while it runs. It lives and dies with the engine; there is no global one.

    Reading: `store.inference.scheduler.max_num_seqs`, `store.get("scheduler.max_num_seqs")` and
    `store["inference.scheduler.max_num_seqs"]` give the same final value. Readers never lock and never wait. Values
    that belong together are read from one `store.current`, an immutable snapshot with its epoch.

    Writing: writers take turns. A transaction is validated as a whole, then told to its subscribers in the order of
    their registration, on the thread of the caller, then takes effect in one assignment as the next epoch. Until then
    everyone, the callbacks included, reads the old values. If a value is refused or a callback raises, nothing
    changes. No lock that a reader, `subscribe` or unsubscribing needs is held during a callback.

    A callback may call `update`: it is checked for names at once, queued, and applied after the current transaction
    (its own transaction, in order of the calls); if the current one is refused, what its callbacks queued is dropped.
    A callback may not wait for another thread that updates: after `wait_s` seconds that thread gets a StateError.
    """

    __slots__ = ("__weakref__", "_closed", "_current", "_held", "_queue", "_subscriptions", "_turn")

    def __init__(self, config: ResolvedConfig, *, wait_s: float = 30.0) -> None:
        self._closed = False
        self._current = first_snapshot(config)
        self._held: tuple[PendingUpdate, list[Notice]] | None = None
        self._queue: deque[_Queued] = deque()
        self._subscriptions = Subscriptions()
        self._turn = WriterTurn(wait_s)

    @property
    def current(self) -> ConfigSnapshot:
        """The snapshot of now."""
        return self._current

    @property
    def shard(self) -> ShardConfig:
        """The final layout of the ranks."""
        return self._current.shard

    @property
    def inference(self) -> InferenceConfig:
        """The final values of how to infer, as of now."""
        return self._current.inference

    def get(self, path: str) -> object:
        """The final value of a field, as of now; the root of the path may be left out."""
        return self._current.get(path)

    def __getitem__(self, path: str) -> object:
        return self._current[path]

    def __contains__(self, path: object) -> bool:
        return path in self._current

    def __iter__(self) -> Iterator[str]:
        return iter(self._current)

    def __len__(self) -> int:
        return len(self._current)

    def describe(self) -> tuple[SettingState, ...]:
        """Every field of now: value, mutability, origin and reason."""
        return self._current.describe()

    def subscribe(
        self, pattern: str, callback: ChangeCallback, *, on_rollback: ChangeCallback | None = None
    ) -> Callable[[], None]:
        """Call `callback` before a transaction on fields of `pattern` takes effect; returns what ends that.

        `pattern` is a path, or one with `*`, `?` or `[...]`; one that matches no field is a ConfigError. The callback
        gets all matching changes at once and may raise ConfigVeto. `on_rollback` gets the same changes if the
        transaction does not take effect after all. The subscriber that raised is not called back.
        """
        self._check_open()
        subscription = Subscription(pattern, callback, on_rollback)
        self._subscriptions.add(subscription)
        unsubscribe = partial(self._subscriptions.remove, subscription)
        if self._closed:  # meanwhile, by another thread, which may have missed it
            unsubscribe()
            self._check_open()
        return unsubscribe

    def update(self, changes: Mapping[str, object], *, source: str = "call") -> ConfigSnapshot | None:
        """Change several live fields at once; returns the snapshot that holds them, `None` if queued by a callback.

        Raises one ConfigError for all refused names and values, ConfigVeto for a veto, ConfigError for a callback that
        raised: nothing has changed then. Values equal to the current ones make no epoch and call nobody. Raises
        QueuedUpdateError if the update took effect, but one that a callback queued did not.
        """
        if self._turn.is_mine:
            check_names(changes, source)
            self._queue.append(_Queued(dict(changes), source))
            return None
        with self._turn.taken():
            pending, _ = self._stage(changes, source)
            self._take_effect(pending)
        return pending.snapshot

    def prepare(self, changes: Mapping[str, object], *, source: str = "call") -> PendingUpdate:
        """The first half of `update`: validate and ask every subscriber, but let nothing take effect yet.

        No other update starts before `commit` or `rollback`, which any thread may call. Raises as `update` does, and
        then there is nothing to roll back.
        """
        with self._turn.taken():
            self._held = self._stage(changes, source)
            self._turn.keep()
            return self._held[0]

    def commit(self, pending: PendingUpdate) -> ConfigSnapshot:
        """The second half of `update`: the prepared values take effect. Raises QueuedUpdateError as `update` does."""
        with self._turn.taken(even_if_kept=True):
            self._let_go(pending)
            self._take_effect(pending)
        return pending.snapshot

    def rollback(self, pending: PendingUpdate) -> None:
        """Give a prepared update up. Those who were told of it hear of the rollback, the last first.

        Raises ConfigError if an `on_rollback` raised; the update is given up all the same.
        """
        with self._turn.taken(even_if_kept=True):
            problems = retract(self._let_go(pending))
            self._queue.clear()
        _raise_problems(problems)

    def decide(self, path: str, value: object, *, source: str) -> ConfigSnapshot:
        """A value that the engine itself decides has changed: the next epoch holds it. Nobody is asked.

        For fields that no `update` may change, such as the attention backend.
        """
        with self._turn.taken():
            self._current = plan_decision(self.current, path, value, source)
            return self._current

    def close(self) -> None:
        """End: roll back what is prepared, drop every subscriber. Every later call but this one is a StateError.

        Snapshots that were taken stay readable.
        """
        if self._closed:
            return
        problems: list[str] = []
        with self._turn.taken(even_if_kept=True):
            if self._held:
                problems = retract(self._let_go(self._held[0]))
            if not self._closed:
                self._closed = True
                del self._current
            self._queue.clear()
            self._subscriptions.clear()
        _raise_problems(problems)

    def __repr__(self) -> str:
        return f"<ConfigStore {'closed' if self._closed else f'epoch {self._current.epoch}'}>"

    if not TYPE_CHECKING:  # a type checker shall see the names above alone

        def __getattr__(self, name: str) -> NoReturn:
            """Only called for what is not there: everything once closed, else a mistyped name."""
            if name.startswith("__"):
                raise AttributeError(name)
            self._check_open()
            raise unknown_setting(name)

    def _check_open(self) -> None:
        if self._closed:
            raise StateError(
                "this configuration store is closed, with its engine",
                remedy="legal calls: close(); snapshots taken before stay readable; build a new engine for more",
            )

    def _stage(self, changes: Mapping[str, object], source: str) -> tuple[PendingUpdate, list[Notice]]:
        """Validate and ask. If that fails, what the callbacks queued meanwhile is dropped."""
        num_queued = len(self._queue)
        try:
            pending = plan_update(self.current, changes, source)
            return pending, self._subscriptions.announce(pending.changes)
        except BaseException:
            while len(self._queue) > num_queued:
                self._queue.pop()
            raise

    def _take_effect(self, pending: PendingUpdate) -> None:
        """Swap, then apply what callbacks queued, each as a transaction of its own."""
        self._current = pending.snapshot
        failures: list[ConfigError] = []
        try:
            for _ in range(MAX_QUEUED):
                if not self._queue:
                    break
                changes, source = self._queue.popleft()
                try:
                    self._current = self._stage(changes, source)[0].snapshot
                except ConfigError as exc:
                    failures.append(exc)
            if self._queue:
                failures.append(_endless())
        finally:
            self._queue.clear()
        if failures:
            raise QueuedUpdateError(pending.snapshot, tuple(failures))

    def _let_go(self, pending: PendingUpdate) -> list[Notice]:
        """End the hold on a prepared update; it must be the one that is held."""
        self._check_open()
        if self._held is None or self._held[0] is not pending:
            legal = "commit() or rollback() of the one that is prepared" if self._held else "update(), prepare()"
            raise StateError(
                "this is not the prepared update of this store: it has ended, or belongs to another store",
                remedy=f"legal calls: {legal}",
            )
        notices = self._held[1]
        self._held = None
        self._turn.let_go()
        return notices


def _endless() -> ConfigError:
    return ConfigError(
        f"callbacks queued more than {MAX_QUEUED} updates after one another",
        remedy="let the callbacks agree: an update to the value a field has ends the chain",
    )


def _raise_problems(problems: list[str]) -> None:
    if problems:
        raise ConfigError(f"the update was rolled back, but {'; '.join(problems)}", remedy="correct the callbacks")
