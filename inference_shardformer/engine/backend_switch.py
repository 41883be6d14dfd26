"""BackendSwitches: exchanges of the attention backend, at step boundaries, on every rank or on none."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from inference_shardformer.attention.switch import BackendSwitch, PreparedBackends
from inference_shardformer.attention.verdicts import from_bytes, to_bytes
from inference_shardformer.config.store import ConfigStore
from inference_shardformer.config.transactions import plan_decision
from inference_shardformer.distributed.records import Outcome, error_of_phase
from inference_shardformer.engine.events import ByteGroup, EventExchange, SwitchBackend
from inference_shardformer.engine.live_updates import LiveUpdates
from inference_shardformer.engine.model_runner import ModelRunner
from inference_shardformer.errors import BackendUnavailableError, InferenceShardformerError, StateError

_log = logging.getLogger(__name__)

_PATH = "inference.attention.backend"
_SOURCE = "switch_backend"


@dataclass(eq=False)
class BackendChange:
    """What became of one switch to `name`. `error` is set once it is given up; the same on every rank.

    With one rank it is settled when the call returns, with several after the next step.
    """

    name: str
    is_done: bool = False
    error: InferenceShardformerError | None = None

    @property
    def is_settled(self) -> bool:
        """Whether it is known what became of it."""
        return self.is_done or self.error is not None


class BackendSwitches:
    """Takes switches in between two steps, and settles them at the boundary. Its owner holds the engine's lock.

    Two phases, and after each all ranks tell each other how it went: every rank prepares (chooses, constructs and
    proves for all groups of layers, converts the cache), then every rank binds. One failure, in either, leaves all of
    them on what served before.
    """

    def __init__(
        self,
        switch: BackendSwitch | None,
        *,
        runner: ModelRunner,
        store: ConfigStore,
        updates: LiveUpdates,
        group: ByteGroup,
        exchange: EventExchange,
        blocks_in_use: Callable[[], Sequence[int]],
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        """`on_change` is told once another backend serves; only `blocks_in_use` are in its layout then."""
        self._switch = switch
        self._runner = runner
        self._store = store
        self._updates = updates
        self._group = group
        self._exchange = exchange
        self._blocks_in_use = blocks_in_use
        self._on_change = on_change
        self._waiting: deque[BackendChange] = deque()

    def request(self, name: str) -> BackendChange:
        """Take a switch in. Raises what this rank refuses; with one rank it is in effect on return."""
        self._known().check(name)
        change = BackendChange(name)
        if self._group.size == 1:
            self._perform(change)
            if change.error is not None:
                raise change.error
            return change
        self._waiting.append(change)
        if self._group.rank == 0:
            self._exchange.post(SwitchBackend(name))
        return change

    def settle(self, event: SwitchBackend) -> None:
        """What rank 0 sent takes effect on every rank, or on none; every rank must be here at the same time."""
        mine = [change for change in self._waiting if change.name == event.name]
        change = mine[0] if mine else BackendChange(event.name)
        if mine:
            self._waiting.remove(change)
        self._perform(change)
        if change.error is not None and self._group.rank == 0:
            _log.warning("the switch to attention backend %s was given up: %s", event.name, change.error.message)

    def drop_unshared(self) -> None:
        """Give up what this rank asked for and rank 0 did not."""
        while self._waiting and self._group.rank > 0:
            self._waiting.popleft().error = StateError(
                f"rank {self._group.rank} asked for another attention backend, and rank 0 did not, or refused it",
                remedy="make the same call on every rank, or on rank 0 alone",
            )

    def close(self) -> None:
        """Give up what waits, and let go of the model."""
        while self._waiting:
            self._waiting.popleft().error = StateError(
                "the engine was closed before the switch took effect", remedy="let the engine step() after a switch"
            )
        self._switch = None

    def _perform(self, change: BackendChange) -> None:
        """Both phases."""
        prepared, failure = self._prepare(change.name)
        change.error = self._agree(failure)
        if change.error is not None or prepared is None:
            return
        known = self._known()
        before = PreparedBackends(known.attention, self._runner.kv_cache, known.selections)
        change.error = self._agree(self._bind(prepared))
        if change.error is not None:
            known.bind(before.attention, before.selections)
            self._runner.bind(before.attention, before.kv_cache)
            return
        known.rank_verdicts = tuple(map(from_bytes, self._group.all_gather_bytes(to_bytes(known.verdicts()))))
        if prepared.attention is not before.attention:
            self._on_change()
        self._updates.make_way()
        self._store.decide(_PATH, change.name, source=_SOURCE)
        change.is_done = True

    def _prepare(self, name: str) -> tuple[PreparedBackends | None, InferenceShardformerError | None]:
        """What this rank has ready, or why it has not."""
        try:
            plan_decision(self._store.current, _PATH, name, _SOURCE)
            return self._known().prepare(name, self._runner.kv_cache, self._blocks_in_use()), None
        except Exception as exc:  # noqa: BLE001 - the boundary at which a failure of one rank becomes a refusal by all
            return None, _typed(exc, f"attention backend {name!r} could not be prepared")

    def _bind(self, prepared: PreparedBackends) -> InferenceShardformerError | None:
        try:
            self._known().bind(prepared.attention, prepared.selections)
            self._runner.bind(prepared.attention, prepared.kv_cache)
        except Exception as exc:  # noqa: BLE001 - as above
            return _typed(exc, f"attention backend {' + '.join(prepared.attention.names)} could not be bound")
        return None

    def _agree(self, failure: InferenceShardformerError | None) -> InferenceShardformerError | None:
        """The failure of the first rank that has one, alike on all."""
        if self._group.size == 1:
            return failure
        answers = self._group.all_gather_bytes(Outcome.of(failure).to_json().encode("ascii"))
        return error_of_phase([Outcome.from_json(answer.decode()) for answer in answers], phase="backend switch")

    def _known(self) -> BackendSwitch:
        if self._switch is None:
            raise StateError(
                "switch_backend() on an engine that was built without a BackendSwitch",
                remedy="let InferenceShardformer.attach() build the engine",
            )
        return self._switch


def _typed(exc: Exception, what: str) -> InferenceShardformerError:
    """One of our errors as it is, any other as the cause of one."""
    if isinstance(exc, InferenceShardformerError):
        return exc
    error = BackendUnavailableError(
        f"{what}: {type(exc).__name__}: {exc}", remedy="stay with the backend that serves, and report this"
    )
    error.__cause__ = exc
    return error
