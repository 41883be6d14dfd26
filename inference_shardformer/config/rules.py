"""Rules in words: what a configuration field accepts, read from its type and bounds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

_KINDS = {int: "an integer", float: "a number", bool: "true or false", str: "text", type(None): "null"}
_BOUNDS = (("gt", "above"), ("ge", "at least"), ("lt", "below"), ("le", "at most"))


def rule_of(info: FieldInfo) -> str:
    """The rule of a field, for example `an integer, at least 1, or auto`."""
    if get_origin(info.annotation) is dict:
        return "options under the names of their plug-ins"
    words = choices_of(info)
    kinds = [
        ", ".join([_KINDS.get(kind, kind.__name__), *_bounds(limits)])
        for kind, limits in _alternatives(info.annotation, info.metadata)
    ]
    if not kinds:
        return f"one of {', '.join(words)}"
    return ", or ".join([*kinds, *words])


def choices_of(info: FieldInfo) -> list[str]:
    """The words a field accepts; empty for a field of free text, or of numbers alone."""
    options = [info.annotation, *get_args(info.annotation)]
    return [str(word) for option in options if get_origin(option) is Literal for word in get_args(option)]


def kinds_of(info: FieldInfo) -> set[type]:
    """The kinds of values that a field accepts, words apart."""
    return {kind for kind, _ in _alternatives(info.annotation, info.metadata)}


def _alternatives(annotation: object, metadata: list[object]) -> Iterator[tuple[type, list[object]]]:
    """Every kind of value an annotation accepts, words apart, each with the metadata that bounds it."""
    if isinstance(annotation, type):
        yield annotation, metadata
    elif get_origin(annotation) is Annotated:
        kind, *more = get_args(annotation)
        inner = [limit for item in more for limit in (item.metadata if isinstance(item, FieldInfo) else [item])]
        yield from _alternatives(kind, [*inner, *metadata])
    elif get_origin(annotation) is not Literal:
        for option in get_args(annotation):
            yield from _alternatives(option, [] if option is type(None) else metadata)


def _bounds(metadata: list[object]) -> list[str]:
    """Bounds as phrases, the lower one first."""
    phrases = [
        f"{words} {getattr(item, name):g}"
        if isinstance(getattr(item, name), float)
        else f"{words} {getattr(item, name)}"
        for name, words in _BOUNDS
        for item in metadata
        if getattr(item, name, None) is not None
    ]
    if any(getattr(item, "min_length", None) for item in metadata):
        phrases.append("not empty")
    return phrases
