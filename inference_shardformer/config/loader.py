"""Loading: every source becomes assignments, the highest wins, pydantic validates the result once."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

from pydantic import BaseModel, ValidationError

from inference_shardformer.config.documents import read_document
from inference_shardformer.config.fields import ENVIRONMENT_PREFIX, ROOTS, all_fields, all_groups, full_path
from inference_shardformer.config.inference import InferenceConfig
from inference_shardformer.config.layers import Assignment, flatten, merge, misused_group, nest
from inference_shardformer.config.origins import DEFAULT, Level, Origin
from inference_shardformer.config.scalars import parse_scalar
from inference_shardformer.config.shard import ShardConfig
from inference_shardformer.config.violations import ConfigViolations, Violation, refused_value, unknown_key


class Flag(NamedTuple):
    """A command-line flag that stands for one field, and the text it was given."""

    name: str
    path: str
    text: str


@dataclass(frozen=True)
class LoadedConfig:
    """Both configurations, and the origin of every field by its full path."""

    shard: ShardConfig
    inference: InferenceConfig
    provenance: Mapping[str, Origin]


def load_config(
    *,
    files: Sequence[str] = (),
    environ: Mapping[str, str] | None = None,
    sets: Sequence[str] = (),
    flags: Sequence[Flag] = (),
    call: Mapping[str, object] | None = None,
) -> LoadedConfig:
    """Merge default < files, in order < environment < command line < call, and validate the result.

    `sets` are texts `path=value`; `call` is a nested mapping with the roots `shard` and `inference`. Raises one
    ConfigError that holds every violation of every source.
    """
    violations: list[Violation] = []
    assignments: list[Assignment] = []
    for name in files:
        document = read_document(name)
        assignments += flatten(document.tree, lambda path: Origin(Level.FILE, document.place(path)), violations)  # noqa: B023
    assignments += _from_environment(environ or {}, violations)
    assignments += _from_command_line(sets, flags, violations)
    assignments += flatten(cast(Mapping[object, object], call or {}), lambda path: Origin(Level.CALL), violations)
    winners = merge(assignments)
    models = {root: _validate(model, root, winners, violations) for root, model in ROOTS.items()}
    if violations:
        raise ConfigViolations(violations)
    provenance = {path: winners[path].origin if path in winners else DEFAULT for path in all_fields()}
    return LoadedConfig(cast(ShardConfig, models["shard"]), cast(InferenceConfig, models["inference"]), provenance)


def _from_environment(environ: Mapping[str, str], violations: list[Violation]) -> Iterator[Assignment]:
    """Assignments of the variables under our prefix; an unknown one is a violation."""
    fields = {field.variable: field for field in all_fields().values()}
    for name in sorted(environ):
        if not name.startswith(ENVIRONMENT_PREFIX):
            continue
        origin = Origin(Level.ENVIRONMENT, name)
        if name in fields:
            yield Assignment(fields[name].path, parse_scalar(environ[name]), origin)
        else:
            near = difflib.get_close_matches(name, fields, n=1, cutoff=0.6)
            violations.append(unknown_key(name, origin, suggestion=near[0] if near else ""))


def _from_command_line(sets: Sequence[str], flags: Sequence[Flag], violations: list[Violation]) -> Iterator[Assignment]:
    """Assignments of `--set` and of the flags. One path may come from `--set` several times, or from its flag."""
    flagged: dict[str, str] = {flag.path: flag.name for flag in flags}
    for flag in flags:
        yield Assignment(flag.path, parse_scalar(flag.text), Origin(Level.CLI, flag.name))
    for text in sets:
        name, equals, value = text.partition("=")
        path = full_path(name.strip())
        origin = Origin(Level.CLI, f"--set {text}")
        if not equals:
            violations.append(
                Violation(text, f"--set {text}", origin, "path=value", "for example --set cache.block_size=32")
            )
        elif path in all_groups():
            violations.append(misused_group(path, value, origin))
        elif path not in all_fields():
            violations.append(unknown_key(name.strip(), origin))
        elif path in flagged:
            rule = f"given once on the command line, and {flagged[path]} gives it too"
            violations.append(Violation(path, f"{path} = {value}", origin, rule, f"drop --set or {flagged[path]}"))
        else:
            yield Assignment(path, parse_scalar(value), origin)


def _validate(
    model: type[BaseModel], root: str, winners: Mapping[str, Assignment], violations: list[Violation]
) -> BaseModel | None:
    """The validated model of one root, or `None` and its violations."""
    try:
        return model.model_validate(nest(winners.values(), root))
    except ValidationError as exc:
        violations.extend(_violations_of(exc, root, winners))
        return None


def _violations_of(exc: ValidationError, root: str, winners: Mapping[str, Assignment]) -> Iterator[Violation]:
    """One violation per refused field; pydantic reports a field of several kinds once per kind."""
    seen: set[str] = set()
    for error in exc.errors(include_url=False):
        path = _field_path(root, error["loc"])
        if path in seen:
            continue
        seen.add(path)
        own_rule = str(error["ctx"]["error"]) if error["type"] == "value_error" else ""
        if path in winners:
            _, value, origin = winners[path]
            yield refused_value(path, value, origin, rule=own_rule)
        else:
            yield Violation(path, path, DEFAULT, own_rule or error["msg"], "change the settings that the rule names")


def _field_path(root: str, location: Iterable[int | str]) -> str:
    """The longest path of a field or a group at the start of a location of pydantic's."""
    path = root
    for part in location:
        longer = f"{path}.{part}"
        if longer not in all_fields() and longer not in all_groups():
            break
        path = longer
    return path
