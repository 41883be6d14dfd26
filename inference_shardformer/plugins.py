"""Registry: named plug-ins of one kind, imported only when one of them is asked for."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, EntryPoints, entry_points
from typing import Generic, Protocol, TypeVar

from inference_shardformer.errors import PluginError

T = TypeVar("T")

RESERVED = ("auto", "tuned")
"""What a setting says in place of a name, so nothing can be registered under it."""


@dataclass(frozen=True)
class _Entry:
    target: object  # the object itself, or its import path as text
    origin: str


class _Announced(Protocol):
    """What `entry_points()` returns, whose class depends on the version of Python."""

    def select(self, *, group: str) -> EntryPoints: ...


class Registry(Generic[T]):
    """Named things of one kind: built in, registered by code, or announced by installed distributions.

    `kind` names them in errors. `entry_point_group` is searched once, when names are first asked for. `check` looks at
    an object after it was loaded and returns what is wrong with it, or `None`.
    """

    def __init__(
        self,
        kind: str,
        *,
        entry_point_group: str | None = None,
        check: Callable[[object], str | None] | None = None,
    ) -> None:
        self.kind = kind
        self._group = entry_point_group
        self._check = check
        self._entries: dict[str, _Entry] = {}
        self._discovered = False

    def register(self, name: str, target: str | T, *, origin: str = "") -> None:
        """Add one entry: an object, or an import path `module:Name` that is imported when the entry is asked for.

        Raises `PluginError` if the name is reserved, if it is taken, naming both origins, or if the path is malformed.
        """
        self._add(self._entries, name, _Entry(target, origin or _describe(target)))

    def names(self) -> tuple[str, ...]:
        """Every name, in order of registration, plug-ins last. Imports none of them."""
        self._discover()
        return tuple(self._entries)

    def origin(self, name: str) -> str:
        """Who brought the entry: an import path, an object, or an entry point with its distribution."""
        return self._entry(name).origin

    def import_path(self, name: str) -> str | None:
        """The text `module:Name` that the entry is imported from; `None` for an object that was registered itself."""
        target = self._entry(name).target
        return target if isinstance(target, str) else None

    def get(self, name: str) -> T:
        """The entry's object, imported now if it was not yet.

        Raises `PluginError` if the name is unknown, if loading fails (the cause is chained), or if the object is not
        what the registry holds.
        """
        entry = self._entry(name)
        loaded = self._load(name, entry) if isinstance(entry.target, str) else entry.target
        problem = self._check(loaded) if self._check else None
        if problem:
            raise PluginError(
                f"{self.kind} {name!r} from {entry.origin} broke its contract: {problem}",
                remedy="update the distribution that brings it, or choose another name",
            )
        return loaded  # type: ignore[return-value]  # what `check` is for

    def unknown(self, name: str) -> str:
        """A sentence on a name that is not registered: the closest one, and all of them."""
        return unknown_name(self.kind, name, self.names())

    def _entry(self, name: str) -> _Entry:
        self._discover()
        if name not in self._entries:
            raise PluginError(self.unknown(name), remedy=f"name a known {self.kind}, or install the one you mean")
        return self._entries[name]

    def _load(self, name: str, entry: _Entry) -> object:
        module, attribute = _split(str(entry.target))
        try:
            loaded: object = importlib.import_module(module)
            for part in attribute.split("."):
                loaded = getattr(loaded, part)
        except Exception as exc:  # foreign code may raise anything while it is imported
            raise PluginError(
                f"{self.kind} {name!r} from {entry.origin} failed to load: {type(exc).__name__}: {exc}",
                remedy="repair or uninstall the distribution that brings it, or choose another name",
            ) from exc
        return loaded

    def _add(self, entries: dict[str, _Entry], name: str, entry: _Entry) -> None:
        if isinstance(entry.target, str) and not all(_split(entry.target)):
            raise PluginError(
                f"{self.kind} {name!r} from {entry.origin}: {entry.target!r} is not an import path",
                remedy="write it as module:Name, for example my_package.my_module:MyClass",
            )
        if name in RESERVED:
            raise PluginError(
                f"{self.kind} {name!r} from {entry.origin}: the name is reserved, a setting of {name!r} chooses among "
                "the registered ones",
                remedy=f"register it under another name than {' and '.join(RESERVED)}",
            )
        known = entries.get(name)
        if known is not None:
            raise PluginError(
                f"{self.kind} {name!r} is registered twice: by {known.origin} and by {entry.origin}",
                remedy="rename one of them, or uninstall the distribution that brings it",
            )
        entries[name] = entry

    def _discover(self) -> None:
        if self._group is None or self._discovered:
            return
        entries = dict(self._entries)
        # A distribution may be listed twice on the path (an editable install beside its source): same text, one entry.
        for point in dict.fromkeys(_announced(tuple(sys.path)).select(group=self._group)):
            self._add(entries, point.name, _Entry(point.value, _origin(point)))
        self._entries, self._discovered = entries, True


@cache
def _announced(path: tuple[str, ...]) -> _Announced:
    """What all distributions on `path`, which is that of this process, announce; read once for all registries."""
    return entry_points()


def unknown_name(kind: str, name: str, names: Sequence[str]) -> str:
    """A sentence on a name that is not among `names`: the closest one, and all of them."""
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"unknown {kind} {name!r}{hint} (known: {', '.join(names) or 'none'})"


def _split(path: str) -> tuple[str, str]:
    module, _, attribute = path.partition(":")
    return module, attribute


def _describe(target: object) -> str:
    if isinstance(target, str):
        return target
    return f"{getattr(target, '__module__', '?')}:{getattr(target, '__qualname__', type(target).__qualname__)}"


def _origin(point: EntryPoint) -> str:
    distribution = f" of {point.dist.name} {point.dist.version}" if point.dist else ""
    return f"entry point {point.name} = {point.value}{distribution}"
