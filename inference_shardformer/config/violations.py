"""Violations: everything that is wrong with a configuration, reported together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from inference_shardformer.config.fields import all_fields, all_groups, members, suggest
from inference_shardformer.config.origins import Origin
from inference_shardformer.config.scalars import parse_scalar
from inference_shardformer.config.suggestions import meant
from inference_shardformer.errors import ConfigError, InferenceShardformerError


@dataclass(frozen=True)
class Violation:
    """One refused value: what was given, where it came from, the rule it breaks, and what to do.

    `error` is the error of its own class that this violation raises when it is the only one.
    """

    path: str
    given: str
    origin: Origin
    rule: str
    remedy: str
    error: InferenceShardformerError | None = field(default=None, compare=False, repr=False)

    def __str__(self) -> str:
        return f"{self.given}\n    from:   {self.origin}\n    rule:   {self.rule}\n    remedy: {self.remedy}"


class ConfigViolations(ConfigError):
    """A configuration with violations. `violations` holds them all, in the order of their sources."""

    def __init__(self, violations: Sequence[Violation]) -> None:
        count = f"{len(violations)} configuration value{'s were' if len(violations) > 1 else ' was'} refused"
        lines = [f"{item.given} ({item.origin}): must be {item.rule}" for item in violations]
        super().__init__(
            "\n".join([count, *lines]),
            remedy="\n".join(f"{item.path}: {item.remedy}" for item in violations),
        )
        self.violations = tuple(violations)
        self._text = "\n".join([count, *(f"  {item}" for item in violations)])

    def __str__(self) -> str:
        return self._text


def raise_all(violations: Sequence[Violation]) -> None:
    """Raise one error for all violations, if there are any: a single one raises the error of its own class."""
    if len(violations) == 1 and violations[0].error is not None:
        raise violations[0].error
    if violations:
        raise ConfigViolations(violations)


def refused_value(path: str, value: object, origin: Origin, *, rule: str = "") -> Violation:
    """A value that breaks the rule of its field; `rule` replaces the rule that follows from the field's type."""
    known = all_fields()[path]
    near = meant(known, value)
    keep = f"leave it out for the default, {show(known.default)}"
    return Violation(
        path=path,
        given=f"{path} = {show(value)}",
        origin=origin,
        rule=rule or known.rule,
        remedy=f"did you mean {near}? or {keep}" if near else f"change it there, or {keep}",
    )


def unknown_key(path: str, origin: Origin, *, given: str = "", suggestion: str = "") -> Violation:
    """A key that names no field; the nearest known path is suggested unless a suggestion is given."""
    near = suggestion or suggest(path)
    group = path.rpartition(".")[0]
    known = (
        f"{group} has {', '.join(members(group))}"
        if group in all_groups()
        else "docs/configuration.md lists the settings"
    )
    return Violation(
        path=path,
        given=given or path,
        origin=origin,
        rule="the name of a known setting",
        remedy=f"did you mean {near}?" if near else f"remove it; {known}",
    )


def show(value: object) -> str:
    """A value as a user would write it: a text that reads like something else is in quotes."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    text = value if isinstance(value, str) and value.isprintable() and parse_scalar(value) == value else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
