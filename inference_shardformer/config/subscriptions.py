"""Subscriptions: who hears of a transaction before it takes effect, and may refuse it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from threading import Lock
from typing import NamedTuple

from inference_shardformer.config.changes import ConfigChange
from inference_shardformer.config.fields import all_fields, all_groups, suggest
from inference_shardformer.errors import ConfigError

ChangeCallback = Callable[[tuple[ConfigChange, ...]], object]
"""Called once per transaction with the changes that match; what it returns is ignored."""


class ConfigVeto(ConfigError):
    """A subscriber refuses a transaction. Raise it with a reason; the caller of update() gets it with the pattern."""

    code = "config_veto"

    def __init__(self, reason: str, *, remedy: str = "", pattern: str = "") -> None:
        text = f"the subscriber of {pattern} refused, so nothing was changed: {reason}" if pattern else reason
        super().__init__(text, remedy=remedy)
        self.reason = reason
        self.pattern = pattern


class Subscription:
    """One callback, and the paths that it hears of. Forgets the callback when dropped."""

    __slots__ = ("callback", "on_rollback", "paths", "pattern")

    def __init__(self, pattern: str, callback: ChangeCallback, on_rollback: ChangeCallback | None) -> None:
        self.pattern = pattern
        self.paths = matching_paths(pattern)
        self.callback: ChangeCallback | None = callback
        self.on_rollback = on_rollback

    def drop(self) -> None:
        """Hear nothing more."""
        self.callback = self.on_rollback = None


class Notice(NamedTuple):
    """What a subscriber was told."""

    subscription: Subscription
    changes: tuple[ConfigChange, ...]


class Subscriptions:
    """Subscribers in the order of their registration.

    The list is replaced, never edited, and its lock is never held during a call: callbacks may subscribe and
    unsubscribe. Who is dropped is not called again; who joins hears of the next transaction.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._entries: tuple[Subscription, ...] = ()

    def add(self, subscription: Subscription) -> None:
        """Append one."""
        with self._lock:
            self._entries = (*self._entries, subscription)

    def remove(self, subscription: Subscription) -> None:
        """Drop one; one that is gone already is passed over."""
        subscription.drop()
        with self._lock:
            self._entries = tuple(entry for entry in self._entries if entry is not subscription)

    def clear(self) -> None:
        """Drop all."""
        with self._lock:
            dropped, self._entries = self._entries, ()
        for subscription in dropped:
            subscription.drop()

    def announce(self, changes: Sequence[ConfigChange]) -> list[Notice]:
        """Tell every subscriber, in order. If one raises, those before it hear of the rollback, and it is refused.

        Raises ConfigVeto for a veto, ConfigError for any other exception, both with the cause.
        """
        notices: list[Notice] = []
        pattern = ""
        try:
            for subscription in self._entries:
                pattern, callback = subscription.pattern, subscription.callback
                matching = tuple(change for change in changes if change.path in subscription.paths)
                if matching and callback:
                    callback(matching)
                    notices.append(Notice(subscription, matching))
        except BaseException as exc:
            problems = retract(notices)
            if isinstance(exc, Exception):
                raise _refused(pattern, exc, problems) from exc
            raise
        return notices


def retract(notices: Sequence[Notice]) -> list[str]:
    """Tell those who were told, last first, that the transaction does not take effect. Returns what they raised."""
    problems: list[str] = []
    for subscription, changes in reversed(notices):
        on_rollback = subscription.on_rollback
        if on_rollback:
            try:
                on_rollback(changes)
            except Exception as exc:  # noqa: BLE001 - every subscriber must hear of it; the caller gets them all
                problems.append(f"on_rollback of {subscription.pattern} raised {type(exc).__name__}: {exc}")
    return problems


def matching_paths(pattern: str) -> frozenset[str]:
    """Full paths of the fields a pattern names: a path, or one with `*`, `?`, `[...]`; the root may be left out."""
    short = {path.split(".", 1)[1]: path for path in all_fields()}
    found = frozenset(
        path for name, path in short.items() if fnmatchcase(path, pattern) or fnmatchcase(name, pattern)
    )  # fmt: skip
    if found:
        return found
    head = re.split(r"[*?\[]", pattern, maxsplit=1)[0].rstrip(".")
    near = suggest(head) if head else ""
    members = f"{near}.*" if near in all_groups() else near
    raise ConfigError(
        f"subscribe({pattern!r}): the pattern matches no setting",
        remedy=f"did you mean {members}?" if members else "name a path such as inference.scheduler.*",
    )


def _refused(pattern: str, exc: Exception, problems: Sequence[str]) -> ConfigError:
    """What the updating caller gets for the exception of a subscriber."""
    more = "".join(f"; {problem}" for problem in problems)
    if isinstance(exc, ConfigVeto):
        return ConfigVeto(f"{exc.reason}{more}", remedy=exc.remedy, pattern=pattern)
    return ConfigError(
        f"the subscriber of {pattern} raised {type(exc).__name__}, so nothing was changed: {exc}{more}",
        remedy="correct the callback, or unsubscribe it",
    )
