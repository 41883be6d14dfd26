"""LiveConfig: the configuration of a running engine as its users see it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, NoReturn
from weakref import WeakMethod

from inference_shardformer.config.inference import InferenceConfig
from inference_shardformer.config.shard import ShardConfig
from inference_shardformer.config.snapshot import ConfigSnapshot, SettingState, unknown_setting
from inference_shardformer.config.store import ConfigStore
from inference_shardformer.config.subscriptions import ChangeCallback
from inference_shardformer.engine.live_updates import ConfigUpdate
from inference_shardformer.errors import StateError

Updater = Callable[..., ConfigUpdate]


class LiveConfig:
    """Reads from an engine's `ConfigStore`, and writes through the engine, so that all of its ranks follow.

    `config.inference.scheduler.max_num_seqs`, `config.get("scheduler.max_num_seqs")` and
    `config["inference.scheduler.max_num_seqs"]` are the same final value, read without a lock. Values that belong
    together are read from one `config.current`. Closing the engine ends it; snapshots stay readable.
    """

    __slots__ = ("_store", "_updater")

    def __init__(self, store: ConfigStore, updater: WeakMethod[Updater]) -> None:
        self._store = store
        self._updater = updater

    @property
    def current(self) -> ConfigSnapshot:
        """The snapshot of now, with its epoch."""
        return self._store.current

    @property
    def shard(self) -> ShardConfig:
        """The final layout of the ranks."""
        return self._store.shard

    @property
    def inference(self) -> InferenceConfig:
        """The final values of how to infer, as of now."""
        return self._store.inference

    def get(self, path: str) -> object:
        """The final value of a field, as of now; the root of the path may be left out."""
        return self._store.get(path)

    def __getitem__(self, path: str) -> object:
        return self._store[path]

    def __contains__(self, path: object) -> bool:
        return path in self._store

    def __iter__(self) -> Iterator[str]:
        return iter(self._store)

    def __len__(self) -> int:
        return len(self._store)

    def describe(self) -> tuple[SettingState, ...]:
        """Every field of now: value, mutability, origin and reason."""
        return self._store.describe()

    def subscribe(
        self, pattern: str, callback: ChangeCallback, *, on_rollback: ChangeCallback | None = None
    ) -> Callable[[], None]:
        """Call `callback` before an update of fields that match takes effect; returns what ends that.

        As `ConfigStore.subscribe`. A callback runs between two steps, which wait for it: on the thread that updates,
        or for updates of rank 0 on the thread that steps. It may read, subscribe and `update()`, not generate.
        """
        return self._store.subscribe(pattern, callback, on_rollback=on_rollback)

    def update(self, changes: Mapping[str, object], *, source: str = "call") -> ConfigUpdate:
        """The same as the engine's `update_config()`."""
        updater = self._updater()
        if updater is None:
            raise StateError("the engine of this configuration is gone", remedy="keep the engine as long as you use it")
        return updater(changes, source=source)

    def __repr__(self) -> str:
        return repr(self._store)

    if not TYPE_CHECKING:  # a type checker shall see the names above alone

        def __getattr__(self, name: str) -> NoReturn:
            """Only called for what is not there."""
            if name.startswith("__"):
                raise AttributeError(name)
            raise unknown_setting(name)
