"""Layers of configuration: assignments to single paths, merged so that the highest level wins."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

from inference_shardformer.config.fields import ConfigField, all_fields, all_groups, members, open_field
from inference_shardformer.config.frozen import freeze
from inference_shardformer.config.origins import Origin
from inference_shardformer.config.violations import Violation, show, unknown_key


class Assignment(NamedTuple):
    """One value given to one full path by one source."""

    path: str
    value: object
    origin: Origin


class Stack(NamedTuple):
    """Everything that was said of one path: what holds, and what it beats, the strongest first."""

    winner: Assignment
    beaten: tuple[Assignment, ...]


def flatten(
    tree: Mapping[object, object],
    origin_of: Callable[[str], Origin],
    violations: list[Violation],
    *,
    prefix: str = "",
) -> list[Assignment]:
    """Assignments of a nested mapping with the roots `shard` and `inference`.

    Unknown keys, and groups that are no mapping, are added to `violations`; an empty group assigns nothing. Below an
    open field every name is accepted here: whoever it belongs to knows which are right.
    """
    found: list[Assignment] = []
    for key, value in tree.items():
        path = f"{prefix}.{key}" if prefix else str(key)
        owner = open_field(path)
        if owner is None and path in all_fields():
            found.append(Assignment(path, value, origin_of(path)))
        elif owner is None and path not in all_groups():
            violations.append(unknown_key(path, origin_of(path)))
        elif isinstance(value, Mapping):
            found += flatten(value, origin_of, violations, prefix=path)
        elif owner is not None and names_option(owner, path):
            found += option(path, value, origin_of(path), violations)
        elif value is not None:
            violations.append(misused_group(path, value, origin_of(path)))
    return found


def names_option(owner: ConfigField, path: str) -> bool:
    """Whether a path in an open field names a plug-in and one of its options, not less."""
    return path[len(owner.path) :].count(".") >= 2 and all(path.split("."))


def option(path: str, value: object, origin: Origin, violations: list[Violation]) -> Iterator[Assignment]:
    """The assignment of an option of a plug-in, which may be any value that a configuration can hold."""
    try:
        freeze(value)
    except ValueError as exc:
        violations.append(Violation(path, f"{path} = {show(value)}", origin, str(exc), "write it as text, in quotes"))
    else:
        yield Assignment(path, value, origin)


def misused_group(path: str, value: object, origin: Origin) -> Violation:
    """A group of settings that was given a single value."""
    names = members(path)
    owner = open_field(path)
    rule = f"a group of settings: {', '.join(names)}" if owner is None else owner.rule
    example = f"{path}.{names[0]}" if owner is None else f"{owner.path}.NAME.OPTION"
    return Violation(
        path=path,
        given=f"{path} = {show(value)}",
        origin=origin,
        rule=rule,
        remedy=f"set one of them by name, for example {example}",
    )


def merge(assignments: Iterable[Assignment]) -> dict[str, Stack]:
    """What was said of every path; the highest level wins and, within a level, the last one given."""
    said: dict[str, list[Assignment]] = {}
    for assignment in sorted(assignments, key=lambda assignment: assignment.origin.level):
        said.setdefault(assignment.path, []).append(assignment)
    return {path: Stack(found[-1], tuple(reversed(found[:-1]))) for path, found in said.items()}


def nest(winners: Iterable[Assignment], root: str) -> dict[str, object]:
    """The winners below `root` as the nested mapping that the root's model validates."""
    tree: dict[str, object] = {}
    for path, value, _ in winners:
        head, *groups, name = path.split(".")
        if head != root:
            continue
        branch = tree
        for group in groups:
            below = branch.setdefault(group, {})
            if isinstance(below, dict):
                branch = below
        branch[name] = value
    return tree
