"""Changes: what an update does to single fields, and how it travels between ranks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, NoReturn

from inference_shardformer.config.fields import full_path
from inference_shardformer.config.snapshot import ConfigSnapshot
from inference_shardformer.errors import ConfigError


class ConfigChange(NamedTuple):
    """One field of a transaction: `epoch` is the one that it will have, `source` what the updating call named."""

    path: str
    old: object
    new: object
    epoch: int
    source: str


@dataclass(frozen=True, eq=False)
class PendingUpdate:
    """A transaction that was validated and accepted by every subscriber, and waits for commit or rollback.

    `changes` are in the order of declaration, the same on every rank; empty if every value is what it was, and then
    `snapshot` is the current one.
    """

    changes: tuple[ConfigChange, ...]
    snapshot: ConfigSnapshot


def encode_changes(changes: Mapping[str, object]) -> bytes:
    """The argument of an update as JSON with full paths; the same changes always give the same bytes."""
    document = {full_path(path): value for path, value in changes.items()}
    if len(document) < len(changes):
        raise ConfigError(
            f"{', '.join(sorted(changes))}: one setting is given under two names", remedy="give every setting once"
        )
    try:
        text = json.dumps(document, separators=(",", ":"), sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as exc:
        raise ConfigError(
            f"an update cannot be sent to the other ranks: {exc}", remedy="give numbers, texts, true or false"
        ) from exc
    return text.encode("ascii")


def decode_changes(payload: bytes) -> dict[str, object]:
    """The inverse of `encode_changes`. Raises ConfigError for anything that it did not write."""
    try:
        document = json.loads(payload.decode("ascii"), parse_constant=_refuse_constant)
    except ValueError as exc:
        raise ConfigError(f"not an encoded update: {exc}", remedy="pass on the bytes of encode_changes()") from exc
    if not isinstance(document, dict):
        raise ConfigError(
            f"not an encoded update: holds a {type(document).__name__}, not an object",
            remedy="pass on the bytes of encode_changes()",
        )
    return document


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")
