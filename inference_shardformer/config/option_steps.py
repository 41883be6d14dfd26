"""Versions of a plug-in's own options: what its author declares, and what is checked of the declaration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from pydantic import BaseModel

OPTIONS_KEY = "options_version"
"""Stands among the options of one plug-in and names their version; without it they are of the current version."""


class OptionChange(NamedTuple):
    """An option that means something else now: why, in words, and the options that its old value becomes."""

    sentence: str
    convert: Callable[[object], Mapping[str, object]]


@dataclass(frozen=True)
class OptionsStep:
    """The way from one version of a plug-in's options to the next.

    Options are named as users name them below the plug-in: `tile`, or `cache.tile` in a nested group. `renamed` maps an
    old name to the new one, `dropped` a name to the reason why it is gone, `changed` a name to its new meaning.
    """

    sentence: str
    renamed: Mapping[str, str] = field(default_factory=dict)
    dropped: Mapping[str, str] = field(default_factory=dict)
    changed: Mapping[str, OptionChange] = field(default_factory=dict)


OptionsSteps = Mapping[int, OptionsStep]
"""The step that leaves each version, by that version; the first version is 1."""


class DeclaresOptions(Protocol):
    """What the class of a plug-in says of its options."""

    Options: type[BaseModel] | None
    options_version: int
    options_steps: OptionsSteps


def declaration_problem(plugin: DeclaresOptions) -> str | None:
    """What is wrong with what a class says of its options, in words; `None` if nothing is."""
    return _model_problem(plugin.Options) or _version_problem(plugin)


def _model_problem(options: object) -> str | None:
    if options is None:
        return None
    if not (isinstance(options, type) and issubclass(options, BaseModel)):
        return f"its Options are {options!r}, not a subclass of pydantic's BaseModel"
    if not (options.model_config.get("frozen") and options.model_config.get("extra") == "forbid"):
        return 'its Options are not declared with model_config = ConfigDict(frozen=True, extra="forbid")'
    if OPTIONS_KEY in options.model_fields:
        return f"its Options have a field {OPTIONS_KEY}; declare the version on the class itself"
    return None


def _version_problem(plugin: DeclaresOptions) -> str | None:
    version, steps = plugin.options_version, plugin.options_steps
    if type(version) is not int or version < 1:
        return f"its options_version is {version!r}, not an integer from 1 on"
    if list(steps) != list(range(1, version)):
        needed = ", ".join(map(str, range(1, version))) or "none"
        return f"its options_steps leave the versions {list(steps)}; options_version {version} needs: {needed}"
    wrong = [number for number, step in steps.items() if not isinstance(step, OptionsStep)]
    return f"its options_steps from {wrong} are no OptionsStep" if wrong else None
