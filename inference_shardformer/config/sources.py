"""ConfigSources: files, environment and command line, read into assignments that know where they came from."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from inference_shardformer.config.documents import Document, read_document
from inference_shardformer.config.fields import ENVIRONMENT_PREFIX, all_fields, all_groups, full_path, open_field
from inference_shardformer.config.layers import Assignment, flatten, misused_group, names_option, option
from inference_shardformer.config.migrate.schema import SCHEMA_KEY, check_schema_version
from inference_shardformer.config.origins import Level, Origin
from inference_shardformer.config.scalars import parse_scalar, parse_text
from inference_shardformer.config.violations import Violation, show, unknown_key
from inference_shardformer.errors import ConfigError


class Flag(NamedTuple):
    """A command-line flag that stands for one field, and the text it was given."""

    name: str
    path: str
    text: str


@dataclass(frozen=True)
class ConfigSources:
    """Where settings come from beside the arguments of a call: files (later ones win), variables, command line.

    `sets` are texts `path=value`. `environ` is the environment of the process as it is now; give a mapping to read that
    one instead, an empty one to read none.
    """

    files: tuple[str | Path, ...] = ()
    sets: tuple[str, ...] = ()
    flags: tuple[Flag, ...] = ()
    environ: Mapping[str, str] = field(default_factory=lambda: dict(os.environ), repr=False)


class Layers(NamedTuple):
    """Everything that all sources said, unmerged, and what was wrong with the saying of it."""

    assignments: tuple[Assignment, ...]
    violations: tuple[Violation, ...]


def read_sources(sources: ConfigSources) -> Layers:
    """Read every source. Nothing is raised: what cannot be read, or names nothing, is a violation."""
    violations: list[Violation] = []
    assignments: list[Assignment] = []
    for name in sources.files:
        assignments += _from_file(str(name), violations)
    assignments += _from_environment(sources.environ, violations)
    assignments += _from_command_line(sources, violations)
    return Layers(tuple(assignments), tuple(violations))


def _from_file(name: str, violations: list[Violation]) -> list[Assignment]:
    """Assignments of one file."""
    try:
        document = read_document(name)
    except ConfigError as exc:
        violations.append(_unreadable(exc, Origin(Level.FILE, name), "a file that can be read as its suffix says"))
        return []
    try:
        tree: Mapping[object, object] = check_schema_version(document.tree, name)
    except ConfigError as exc:
        violations.append(_unreadable(exc, _place(document, SCHEMA_KEY), "the version of the settings in this file"))
        return []
    found = flatten(tree, lambda path: _place(document, path), violations)
    return list(_given_once(found, violations))


def _given_once(assignments: Iterable[Assignment], violations: list[Violation]) -> Iterator[Assignment]:
    """The assignments of one file, which may spell a path in one key or in several, but not in both ways."""
    seen: set[str] = set()
    for path, value, origin in assignments:
        if path in seen:
            given, remedy = f"{path} = {show(value)}", "drop one of the two spellings"
            violations.append(Violation(path, given, origin, "given once in a file, and it is given twice", remedy))
        else:
            seen.add(path)
            yield Assignment(path, value, origin)


def _place(document: Document, path: str) -> Origin:
    return Origin(Level.FILE, document.place(path))


def _unreadable(error: ConfigError, origin: Origin, rule: str) -> Violation:
    return Violation(origin.where, error.message, origin, rule, error.remedy, error)


def _from_environment(environ: Mapping[str, str], violations: list[Violation]) -> Iterator[Assignment]:
    """Assignments of the variables under our prefix; an unknown one is a violation."""
    fields = {known.variable: known for known in all_fields().values() if not known.is_open}
    for name in sorted(environ):
        if not name.startswith(ENVIRONMENT_PREFIX):
            continue
        origin = Origin(Level.ENVIRONMENT, name)
        path = name.removeprefix(ENVIRONMENT_PREFIX).replace("__", ".").lower()
        owner = open_field(path)
        if name in fields:
            yield Assignment(fields[name].path, _value(fields[name].path, environ[name]), origin)
        elif owner is not None:
            yield from _one(path, _value(path, environ[name]), origin, violations)
        else:
            violations.append(unknown_key(name, origin, suggestion=_near_variable(name, fields)))


def _near_variable(name: str, known: Iterable[str]) -> str:
    """The variable nearest to an unknown one; empty if none is near. The prefix, which all have, counts for nothing."""
    short = {variable.removeprefix(ENVIRONMENT_PREFIX): variable for variable in known}
    near = difflib.get_close_matches(name.removeprefix(ENVIRONMENT_PREFIX).upper(), short, n=1, cutoff=0.6)
    return short[near[0]] if near else ""


def _from_command_line(sources: ConfigSources, violations: list[Violation]) -> Iterator[Assignment]:
    """Assignments of `--set` and of the flags. One path may come from `--set` several times, or from its flag."""
    flagged: dict[str, str] = {flag.path: flag.name for flag in sources.flags}
    for flag in sources.flags:
        yield Assignment(flag.path, _value(flag.path, flag.text), Origin(Level.CLI, flag.name))
    for text in sources.sets:
        name, equals, value = text.partition("=")
        path = full_path(name.strip())
        origin = Origin(Level.CLI, f"--set {text}")
        if not equals:
            violations.append(
                Violation(text, f"--set {text}", origin, "path=value", "for example --set cache.block_size=32")
            )
        elif path in flagged:
            rule = f"given once on the command line, and {flagged[path]} gives it too"
            violations.append(Violation(path, f"{path} = {value}", origin, rule, f"drop --set or {flagged[path]}"))
        elif path in all_fields() or path in all_groups() or open_field(path):
            yield from _one(path, _value(path, value), origin, violations)
        else:
            violations.append(unknown_key(name.strip(), origin))


def _value(path: str, text: str) -> object:
    """What a text given to one path says: a text setting takes it as it is; nothing is null where null may be."""
    field = all_fields().get(path)
    if field is None or field.is_open:
        return parse_scalar(text)
    if not text.strip() and not field.is_optional:
        return ""
    return parse_text(text) if field.is_text else parse_scalar(text)


def _one(path: str, value: object, origin: Origin, violations: list[Violation]) -> Iterator[Assignment]:
    """The assignments of one known path given as text; a mapping given to an open field is several."""
    owner = open_field(path)
    if owner is not None and isinstance(value, Mapping):
        yield from flatten(value, lambda _: origin, violations, prefix=path)
    elif path in all_groups() or (owner is not None and not names_option(owner, path)):
        violations.append(misused_group(path, value, origin))
    elif owner is not None:
        yield from option(path, value, origin, violations)
    else:
        yield Assignment(path, value, origin)
