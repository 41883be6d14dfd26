"""FrozenMapping: a mapping of configuration values that cannot change and has a hash."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NoReturn


class FrozenMapping(dict[str, object]):
    """A dictionary whose content is fixed, as deep as it goes: lists in it are tuples."""

    def __init__(self, content: Mapping[str, object] | None = None) -> None:
        super().__init__({key: freeze(value) for key, value in (content or {}).items()})

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))

    def __reduce__(self) -> tuple[type[FrozenMapping], tuple[dict[str, object]]]:
        return type(self), (dict(self),)

    def _refuse(self, *args: object, **kwargs: object) -> NoReturn:
        raise TypeError("a configuration cannot be changed; make another one")

    __setitem__ = __delitem__ = __ior__ = _refuse
    clear = pop = popitem = setdefault = update = _refuse


def freeze(value: object) -> object:
    """The value with every mapping and list in it replaced by one that cannot change; only values are accepted."""
    if isinstance(value, Mapping):
        return FrozenMapping({str(key): item for key, item in value.items()})
    if isinstance(value, list | tuple):
        return tuple(freeze(item) for item in value)
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise ValueError(f"numbers, texts, true or false, null, lists and mappings of them, not a {type(value).__name__}")


def frozen_or_text(value: object) -> object:
    """As `freeze`; whatever is no value of a configuration becomes text."""
    try:
        return freeze(value)
    except ValueError:
        return str(value)
