"""LiveUpdates: changes of the live configuration, at step boundaries, on every rank or on none."""

from __future__ import annotations

import json
import logging
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from inference_shardformer.config.changes import PendingUpdate, decode_changes, encode_changes
from inference_shardformer.config.snapshot import ConfigSnapshot
from inference_shardformer.config.store import MAX_QUEUED, ConfigStore, QueuedUpdateError
from inference_shardformer.config.subscriptions import ConfigVeto
from inference_shardformer.config.transactions import check_names, plan_update
from inference_shardformer.engine.events import ByteGroup, EventExchange, UpdateConfig
from inference_shardformer.errors import ConfigError, InferenceShardformerError, StateError

_log = logging.getLogger(__name__)


@dataclass(eq=False)
class ConfigUpdate:
    """What became of one update. `snapshot` is set once it is in effect, `error` once it is given up.

    With one rank that is so when the call returns, with several after the next step. `changes` is what was asked, as
    JSON. On ranks above 0, what a callback asks for is left to the same callback on rank 0.
    """

    changes: str
    source: str
    snapshot: ConfigSnapshot | None = None
    error: InferenceShardformerError | None = None

    @property
    def is_settled(self) -> bool:
        """Whether it is known what became of it."""
        return self.snapshot is not None or self.error is not None

    def is_for(self, changes: str, source: str) -> bool:
        """Whether this asks for just that."""
        return (self.changes, self.source) == (changes, source)


@dataclass(eq=False)
class _Entry:
    """An update on its way. `pending`: this rank's subscribers accepted it, and `asked` for more meanwhile."""

    update: ConfigUpdate
    pending: PendingUpdate | None = None
    asked: list[ConfigUpdate] = field(default_factory=list)


class LiveUpdates:
    """Takes updates in between two steps, and settles them at the boundary. Its owner holds the engine's lock.

    Two phases: every rank prepares (validates, asks its subscribers), all tell each other how that went, and all commit
    or all roll back. The rank of the call prepares at once, so its own subscribers' veto is raised there; while an
    update waits for the boundary, later ones are validated at once and prepared there.
    """

    def __init__(self, store: ConfigStore, group: ByteGroup, exchange: EventExchange) -> None:
        self._store = store
        self._group = group
        self._exchange = exchange
        self._waiting: deque[_Entry] = deque()
        self._asked: list[ConfigUpdate] | None = None  # what callbacks ask for, while one is running

    @property
    def is_asking(self) -> bool:
        """Whether a callback is running."""
        return self._asked is not None

    def update(self, changes: Mapping[str, object], source: str) -> ConfigUpdate:
        """Take an update in. Raises for what this rank refuses; with one rank it is in effect on return.

        Called by a callback, it is checked for names and comes after the update that the callback is told of.
        """
        if self._asked is not None:
            check_names(changes, source)
            self._asked.append(ConfigUpdate(_encoded(changes), source))
            return self._asked[-1]
        plan_update(self._store.current, changes, source)  # raises all that is wrong with names and values
        entry = _Entry(ConfigUpdate(_encoded(changes), source))
        if not self._waiting:
            self._prepare(entry)
        if self._group.size == 1:
            failures = self._settle_all(entry)
            if failures and entry.update.snapshot is not None:
                raise QueuedUpdateError(entry.update.snapshot, tuple(failures))
            return entry.update
        self._waiting.append(entry)
        if self._group.rank == 0:
            self._exchange.post(UpdateConfig(entry.update.changes, source))
        return entry.update

    def settle(self, event: UpdateConfig) -> None:
        """What rank 0 sent takes effect on every rank, or on none; every rank must be here at the same time."""
        for error in self._settle_all(self._entry_of(event)):
            if self._group.rank == 0:
                _log.warning("an update of the configuration was given up: %s", error.message)

    def make_way(self) -> None:
        """Take back what this rank has prepared, for a change that comes first; it is prepared again in its turn."""
        if self._waiting:
            self._take_back(self._waiting[0])

    def drop_unshared(self) -> None:
        """Give up what this rank asked for and rank 0 did not, neither now nor before."""
        while self._waiting and self._group.rank > 0:
            entry = self._waiting.popleft()
            self._take_back(entry)
            entry.update.error = ConfigError(
                f"rank {self._group.rank} asked for an update, and rank 0 did not, or refused it",
                remedy="make the same call on every rank, or on rank 0 alone",
            )

    def close(self) -> None:
        """Give up what waits. Closing the store rolls back what is prepared."""
        while self._waiting:
            self._waiting.popleft().update.error = StateError(
                "the engine was closed before the update took effect", remedy="let the engine step() after an update"
            )

    def _settle_all(self, entry: _Entry) -> list[ConfigError]:
        """Settle an update and then, one after another, what callbacks asked for. Returns what was refused."""
        queue = deque([entry])
        failures: list[ConfigError] = []
        for _ in range(MAX_QUEUED):
            if not queue:
                return failures
            entry = queue.popleft()
            refusal, asked = self._agree(entry, self._refusal(entry))
            if refusal is None and entry.pending is not None:
                entry.update.snapshot = self._store.commit(entry.pending)
                queue.extend(asked)
            elif refusal is not None:
                problem = self._take_back(entry)
                entry.update.error = refusal
                failures += [refusal, problem] if problem else [refusal]
        return [*failures, *_endless(queue)]

    def _refusal(self, entry: _Entry) -> ConfigError | None:
        """Why this rank cannot accept an update; prepares it unless that was done when it was called for."""
        if entry.pending is None:
            try:
                self._prepare(entry)
            except ConfigError as error:
                return error
        return None

    def _agree(self, entry: _Entry, refusal: ConfigError | None) -> tuple[ConfigError | None, list[_Entry]]:
        """The refusal of the first rank that has one, and what the callbacks of rank 0 asked for; alike on all."""
        if self._group.size == 1:
            return refusal, [_Entry(update) for update in entry.asked]
        own = {
            "refusal": None if refusal is None else [isinstance(refusal, ConfigVeto), refusal.message, refusal.remedy],
            "asked": [[update.changes, update.source] for update in entry.asked],
        }
        answers = [json.loads(answer) for answer in self._group.all_gather_bytes(json.dumps(own).encode("ascii"))]
        refusals = [_refused_on(rank, *said) for rank, answer in enumerate(answers) if (said := answer["refusal"])]
        asked = []
        for changes, source in answers[0]["asked"]:
            mine = [update for update in entry.asked if update.is_for(changes, source) and not update.is_settled]
            asked.append(_Entry(mine[0] if mine else ConfigUpdate(changes, source)))
        return refusals[0] if refusals else None, asked

    def _entry_of(self, event: UpdateConfig) -> _Entry:
        """The call of this rank that an event answers, or a new entry if this rank made none."""
        matching = [entry for entry in self._waiting if entry.update.is_for(event.changes, event.source)]
        entry = matching[0] if matching else _Entry(ConfigUpdate(event.changes, event.source))
        if matching:
            self._waiting.remove(entry)
        if self._waiting and entry.pending is None:  # rank 0 has another one first
            self._take_back(self._waiting[0])
        return entry

    def _prepare(self, entry: _Entry) -> None:
        changes = decode_changes(entry.update.changes.encode("ascii"))
        with self._listening() as asked:
            entry.pending = self._store.prepare(changes, source=entry.update.source)
        entry.asked = asked

    def _take_back(self, entry: _Entry) -> ConfigError | None:
        """Roll an update back if this rank prepared it; returns what went wrong in that."""
        pending, entry.pending, entry.asked = entry.pending, None, []
        if pending is not None:
            try:
                with self._listening():  # what is asked for during a rollback is dropped
                    self._store.rollback(pending)
            except ConfigError as error:
                return error
        return None

    @contextmanager
    def _listening(self) -> Iterator[list[ConfigUpdate]]:
        asked: list[ConfigUpdate] = []
        self._asked = asked
        try:
            yield asked
        finally:
            self._asked = None


def _encoded(changes: Mapping[str, object]) -> str:
    return encode_changes(changes).decode("ascii")


def _refused_on(rank: int, is_veto: bool, message: str, remedy: str) -> ConfigError:
    return (ConfigVeto if is_veto else ConfigError)(f"rank {rank}: {message}", remedy=remedy)


def _endless(queue: Sequence[_Entry]) -> list[ConfigError]:
    errors = []
    for entry in queue:
        entry.update.error = error = ConfigError(
            f"callbacks asked for more than {MAX_QUEUED} updates after one another",
            remedy="let the callbacks agree: an update to the value a field has ends the chain",
        )
        errors.append(error)
    return errors
