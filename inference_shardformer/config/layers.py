"""Layers of configuration: assignments to single paths, merged so that the highest level wins."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from inference_shardformer.config.fields import all_fields, all_groups
from inference_shardformer.config.origins import Origin
from inference_shardformer.config.violations import Violation, show, unknown_key


class Assignment(NamedTuple):
    """One value given to one full path by one source."""

    path: str
    value: object
    origin: Origin


def flatten(
    tree: Mapping[object, object],
    origin_of: Callable[[str], Origin],
    violations: list[Violation],
    *,
    prefix: str = "",
) -> list[Assignment]:
    """Assignments of a nested mapping with the roots `shard` and `inference`.

    Unknown keys, and groups that are no mapping, are added to `violations`; an empty group assigns nothing.
    """
    found: list[Assignment] = []
    for key, value in tree.items():
        path = f"{prefix}.{key}" if prefix else str(key)
        if path in all_fields():
            found.append(Assignment(path, value, origin_of(path)))
        elif path not in all_groups():
            violations.append(unknown_key(path, origin_of(path)))
        elif isinstance(value, Mapping):
            found += flatten(value, origin_of, violations, prefix=path)
        elif value is not None:
            violations.append(misused_group(path, value, origin_of(path)))
    return found


def misused_group(path: str, value: object, origin: Origin) -> Violation:
    """A group of settings that was given a single value."""
    members = sorted({name[len(path) + 1 :].split(".")[0] for name in all_fields() if name.startswith(f"{path}.")})
    return Violation(
        path=path,
        given=f"{path} = {show(value)}",
        origin=origin,
        rule=f"a group of settings: {', '.join(members)}",
        remedy=f"set one of them by name, for example {path}.{members[0]}",
    )


def merge(assignments: Iterable[Assignment]) -> dict[str, Assignment]:
    """The winner of every path: the highest level and, within a level, the last one given."""
    ordered = sorted(assignments, key=lambda assignment: assignment.origin.level)
    return {assignment.path: assignment for assignment in ordered}


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
