"""What becomes of one foreign field: the fates, and the few ways in which a field comes to its fate."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["renamed", "same", "changed", "dropped", "refused", "unknown", "undecided", "upgraded"]
"""`same`: the name stayed and the place moved. `changed`: carried or told, with another meaning here.

`upgraded`: a step between versions of our own schema. `refused`, `unknown` and `undecided` are failures.
"""
FAILURES: frozenset[Kind] = frozenset({"refused", "unknown", "undecided"})


@dataclass(frozen=True)
class Undecided:
    """A value that is known only when the program runs: its text in the source."""

    text: str


@dataclass(frozen=True)
class Fate:
    """What becomes of one value: the settings of ours that it gives, and why."""

    kind: Kind
    sentence: str
    settings: Mapping[str, object] = field(default_factory=dict)


Given = Mapping[str, object]
"""Every value of the same source by its foreign name, `Undecided` ones among them."""
Converter = Callable[[object, Given], Fate]


@dataclass(frozen=True)
class ForeignField:
    """One field of a foreign configuration: its default there, what it becomes here, and how a value is converted.

    `sentence` is for the documentation. Without `needs_value` the fate does not hang on the value, which may then be
    `Undecided`.
    """

    name: str
    default: object
    kind: Kind
    becomes: str
    sentence: str
    convert: Converter
    needs_value: bool = True


def carried(name: str, default: object, path: str, sentence: str) -> ForeignField:
    """A field whose value is ours as it is."""
    kind: Kind = "same" if path.rpartition(".")[2] == name else "renamed"

    def convert(value: object, given: Given) -> Fate:
        return Fate(kind, sentence, {path: value})

    return ForeignField(name, default, kind, f"`{path}`", sentence, convert)


def dropped(name: str, default: object, sentence: str) -> ForeignField:
    """A field that had no effect on inference, whatever its value."""

    def convert(value: object, given: Given) -> Fate:
        return Fate("dropped", sentence)

    return ForeignField(name, default, "dropped", "nothing", sentence, convert, needs_value=False)


def refused(name: str, default: object, sentence: str) -> ForeignField:
    """A field of something that is not offered here: its default asks for nothing, any other value is refused."""

    def convert(value: object, given: Given) -> Fate:
        if value == default and isinstance(value, bool) == isinstance(default, bool):
            return Fate("dropped", "the default, which asks for nothing")
        return Fate("refused", sentence)

    return ForeignField(name, default, "refused", "nothing; any value but the default is refused", sentence, convert)


def part_of(owner: str, off: object, name: str, default: object, sentence: str) -> ForeignField:
    """A field that had an effect only where `owner`, which is refused, was on; dropped where it is off."""

    def convert(value: object, given: Given) -> Fate:
        asked = given.get(owner, off)
        if asked == off or value is None or isinstance(asked, Undecided):
            return Fate("dropped", sentence)
        return Fate("refused", f"belongs to {owner}, which is refused")

    becomes = f"nothing; refused together with `{owner}`"
    return ForeignField(name, default, "dropped", becomes, sentence, convert, needs_value=False)


def switch(name: str, sentence: str, *, settings: Mapping[str, object] | None = None) -> ForeignField:
    """A switch, off by default, whose place is taken by a choice of ours: telling what it meant is all there is."""
    becomes = ", ".join(f"`{path}: {value}`" for path, value in (settings or {}).items()) or "nothing"

    def convert(value: object, given: Given) -> Fate:
        return (
            Fate("changed", sentence, settings or {}) if value else Fate("dropped", "off, as it is here: " + sentence)
        )

    return ForeignField(name, False, "changed", becomes, sentence, convert, needs_value=False)
