"""What enters the engine from outside, and how every rank gets the same of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from typing import NamedTuple, Protocol

from inference_shardformer.engine.sampling_params import SamplingParams
from inference_shardformer.errors import EnvironmentMismatchError


@dataclass(frozen=True)
class AddRequest:
    """A validated request joins the waiting queue; it takes the sampling defaults that hold at that moment."""

    request_id: str
    index: int
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams


@dataclass(frozen=True)
class AbortRequest:
    """A request ends at the next step boundary; unknown and finished ones are passed over."""

    request_id: str


@dataclass(frozen=True)
class AbandonRequest:
    """The call of a request did not come to its end; as `AbortRequest`, but perhaps on one rank alone, or later."""

    request_id: str


@dataclass(frozen=True)
class UpdateConfig:
    """Live settings change, if every rank accepts it. `changes` is what `encode_changes` made of them."""

    changes: str
    source: str


@dataclass(frozen=True)
class SwitchBackend:
    """The attention backend is exchanged, if every rank is ready for it."""

    name: str


@dataclass(frozen=True)
class UpdateWeights:
    """New weights arrive, on every rank or on none. The weights themselves travel apart."""


@dataclass(frozen=True)
class ResetPrefixCache:
    """Nothing that was computed before is found any more."""


@dataclass(frozen=True)
class Dismiss:
    """The ranks that follow rank 0 need not do so any longer."""


Event = (
    AddRequest
    | AbortRequest
    | AbandonRequest
    | UpdateConfig
    | SwitchBackend
    | UpdateWeights
    | ResetPrefixCache
    | Dismiss
)
_COMPARED = AddRequest | AbortRequest  # the others are asked for by rank 0 alone


class Delivery(NamedTuple):
    """What rank 0 sent for one step, and the ranks that had made other calls; the same on every rank."""

    events: list[Event]
    diverged_ranks: list[int]

    def agreed(self) -> list[Event]:
        """The events; raises `EnvironmentMismatchError`, on every rank, if a rank made other calls than rank 0."""
        if self.diverged_ranks:
            raise _diverged(self.diverged_ranks)
        return self.events


class ByteGroup(Protocol):
    """The part of a tensor-parallel group that carries small messages."""

    rank: int
    size: int

    def broadcast_bytes(self, payload: bytes | None, *, src: int = 0) -> bytes:
        """Rank `src`'s message, on every rank."""

    def all_gather_bytes(self, payload: bytes) -> list[bytes]:
        """Every rank's message, in rank order."""


class EventExchange:
    """Collects the local calls between two steps and replaces them by those of rank 0.

    Ranks above 0 may make the same calls as rank 0, which is checked, or none, and follow. Updates of the configuration
    and of the weights, switches of the backend, resets of the prefix cache, calls given up and the end of following are
    those of rank 0 and not compared: what another rank asks for is nothing but a wish.
    """

    def __init__(self, group: ByteGroup) -> None:
        self._group = group
        self._pending: list[Event] = []
        self._pending_adds: set[str] = set()

    @property
    def has_pending(self) -> bool:
        """Whether requests were added or aborted by local calls since the last step."""
        return bool(_about_requests(self._pending))

    @property
    def num_pending_adds(self) -> int:
        """Requests added by local calls since the last step."""
        return len(self._pending_adds)

    def adds(self, request_id: str) -> bool:
        """Whether a local call since the last step added this request."""
        return request_id in self._pending_adds

    def post(self, event: Event) -> None:
        """Note a local call."""
        self._pending.append(event)
        if isinstance(event, AddRequest):
            self._pending_adds.add(event.request_id)

    def forget(self, request_ids: set[str]) -> None:
        """Drop the local calls about these requests."""
        self._pending = [
            event
            for event in self._pending
            if not isinstance(event, _COMPARED | AbandonRequest) or event.request_id not in request_ids
        ]
        self._pending_adds -= request_ids

    def receive(self) -> Delivery:
        """What happens at this step; every rank must call this once a step.

        Raises `EnvironmentMismatchError` on the rank that made calls where rank 0 made none.
        """
        local, self._pending = self._pending, []
        self._pending_adds.clear()
        group = self._group
        if group.size == 1:
            return Delivery(local, [])
        payload = group.broadcast_bytes(encode_events(local) if local and group.rank == 0 else None)
        compared = _about_requests(local)
        if not payload:
            if compared:
                raise _diverged([group.rank])
            return Delivery([], [])
        digests = group.all_gather_bytes(sha256(encode_events(compared)).digest() if compared else b"")
        diverged = [rank for rank, digest in enumerate(digests) if digest and digest != digests[0]]
        return Delivery(local if group.rank == 0 else decode_events(payload), diverged)


def encode_events(events: Sequence[Event]) -> bytes:
    """Events as JSON; the same events always give the same bytes."""
    document = [{"type": _NAMES[type(event)], **asdict(event)} for event in events]
    return json.dumps(document, separators=(",", ":"), sort_keys=True).encode("ascii")


def decode_events(payload: bytes) -> list[Event]:
    """The inverse of `encode_events`."""
    return [_decode(record) for record in json.loads(payload)]


_NAMES: dict[type[Event], str] = {
    AddRequest: "add",
    AbortRequest: "abort",
    AbandonRequest: "abandon",
    UpdateConfig: "configure",
    SwitchBackend: "switch",
    UpdateWeights: "weights",
    ResetPrefixCache: "reset_prefixes",
    Dismiss: "dismiss",
}
_TYPES: dict[str, type[Event]] = {name: kind for kind, name in _NAMES.items()}


def _decode(record: dict) -> Event:
    kind = _TYPES[record.pop("type")]
    if kind is not AddRequest:
        return kind(**record)
    params = SamplingParams(**record.pop("params"))
    return AddRequest(prompt_token_ids=tuple(record.pop("prompt_token_ids")), params=params, **record)


def _about_requests(events: Sequence[Event]) -> list[Event]:
    return [event for event in events if isinstance(event, _COMPARED)]


def _diverged(ranks: list[int]) -> EnvironmentMismatchError:
    return EnvironmentMismatchError(
        f"ranks {ranks} added or aborted other requests than rank 0 before this step",
        remedy="call the engine with the same arguments in the same order on every rank, or on rank 0 alone "
        "while the others only step()",
    )
