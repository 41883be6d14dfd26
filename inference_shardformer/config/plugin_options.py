"""The options of one plug-in, held against what it declares: names, values and version, like settings of our own."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from pydantic import BaseModel, ValidationError

from inference_shardformer.config.fields import all_fields
from inference_shardformer.config.frozen import frozen_or_text
from inference_shardformer.config.loader import MergedConfig
from inference_shardformer.config.option_steps import OPTIONS_KEY, OptionsSteps
from inference_shardformer.config.rules import rule_of
from inference_shardformer.config.violations import Violation, raise_all, show
from inference_shardformer.errors import PluginError


@dataclass(frozen=True)
class DeclaredOptions:
    """What one plug-in declares. `kind` and `name` are for texts (`attention backend`, `toy`), `base` is where its
    options are set (`inference.attention.options.toy`). Without a `model` it takes none.
    """

    kind: str
    name: str
    base: str
    model: type[BaseModel] | None
    version: int
    steps: OptionsSteps


@dataclass(frozen=True)
class ChosenOptions:
    """The options of a plug-in that is used: typed, and every one of them by its path. `None`: it declares none."""

    typed: BaseModel | None
    leaves: dict[str, object]


OptionsLookup = Callable[[str, str], DeclaredOptions]
"""The declaration of a plug-in, by the field that holds its kind's options and its name.

Raises `PluginError` for a name that nobody has, and for a plug-in that does not load.
"""


def check_plugins(merged: MergedConfig, lookup: OptionsLookup) -> list[Violation]:
    """Everything that is wrong with the options of any plug-in, whether it is chosen or not."""
    groups = {path: merged.value(path) for path, known in all_fields().items() if known.is_open}
    return [
        violation
        for field, group in groups.items()
        if isinstance(group, Mapping)
        for name in group
        for violation in _check_plugin(field, name, merged, lookup)
    ]


def typed_options(declared: DeclaredOptions, merged: MergedConfig) -> ChosenOptions:
    """The options of a plug-in. Raises `ConfigViolations` for what `check_plugins` tells, and for a missing one."""
    if declared.model is None:
        return ChosenOptions(None, {})
    raise_all(list(_option_violations(declared, declared.model, merged)))
    typed = declared.model.model_validate(_given(declared, merged))
    return ChosenOptions(typed, dict(_leaves(typed, declared.base)))


def without_version(options: Mapping[str, object]) -> dict[str, object]:
    """The options of one plug-in without their version, as its model takes them."""
    return {name: value for name, value in options.items() if name != OPTIONS_KEY}


def _check_plugin(field: str, name: str, merged: MergedConfig, lookup: OptionsLookup) -> Iterator[Violation]:
    base = f"{field}.{name}"
    try:
        declared = lookup(field, name)
    except PluginError as exc:
        yield from _each(base, merged, f"of a plug-in that can be used: {exc.message}", exc.remedy)
        return
    if declared.model is None:
        yield from _each(base, merged, f"left out: {declared.kind} {name} takes no options", "remove it")
        return
    versions = list(_version_violations(declared, merged))
    yield from versions
    if not versions:  # of another version the names would be wrong as well
        yield from _option_violations(declared, declared.model, merged)


def _given(declared: DeclaredOptions, merged: MergedConfig) -> dict[str, object]:
    group = merged.value(declared.base.rpartition(".")[0])
    own = group.get(declared.name, {}) if isinstance(group, Mapping) else {}
    return without_version(own) if isinstance(own, Mapping) else {}


def _each(base: str, merged: MergedConfig, rule: str, remedy: str) -> Iterator[Violation]:
    """The same violation for every option given to one plug-in."""
    for path, stack in merged.stacks.items():
        if path.startswith(f"{base}."):
            given = f"{path} = {show(stack.winner.value)}"
            yield Violation(path, given, stack.winner.origin, rule, remedy)


def _version_violations(declared: DeclaredOptions, merged: MergedConfig) -> Iterator[Violation]:
    """Versions that any source names and that are not the current one: levels are not mixed across versions."""
    path, current = f"{declared.base}.{OPTIONS_KEY}", declared.version
    stack = merged.stacks.get(path)
    for _, version, origin in (stack.winner, *stack.beaten) if stack else ():
        if type(version) is int and version == current:
            continue
        given = f"{path} = {show(version)}"
        if type(version) is not int or version < 1:
            rule, remedy = f"an integer from 1 to {current}", f"write {OPTIONS_KEY}: {current}"
        elif version > current:
            rule = f"at most {current}, the version of the installed {declared.kind} {declared.name}"
            remedy = "upgrade the distribution that brings it, or write the options for this version"
        else:
            rule = f"the current {current} of {declared.kind} {declared.name}; this is older"
            remedy = "inference-shardformer migrate FILE --to FILE"
        yield Violation(path, given, origin, rule, remedy)


def _option_violations(declared: DeclaredOptions, model: type[BaseModel], merged: MergedConfig) -> Iterator[Violation]:
    """One violation per refused option; pydantic reports a field of several kinds once per kind."""
    try:
        model.model_validate(_given(declared, merged))
        return
    except ValidationError as exc:
        errors = exc.errors(include_url=False)
    seen: set[str] = set()
    base = declared.base
    for error in errors:
        location = [str(part) for part in error["loc"]]
        path = _longest_known(base, location, merged)
        if path in seen:
            continue
        seen.add(path)
        origin = merged.origin(path)
        if error["type"] == "extra_forbidden":
            groups = location[:-1]
            names = [".".join([*groups, name]) for name in _group_of(model, groups).model_fields]
            near = difflib.get_close_matches(".".join(location), names, n=1)
            known = f"the name of an option of {declared.kind} {declared.name}: {', '.join(names)}"
            yield Violation(path, path, origin, known, f"did you mean {base}.{near[0]}?" if near else "remove it")
            continue
        info = _group_of(model, location[:-1]).model_fields.get(location[-1]) if location else None
        rule = rule_of(info) if info is not None and error["type"] != "value_error" else str(error["msg"])
        value = merged.stacks[path].winner.value if path in merged.stacks else error["input"]
        keep = "change it there, or leave it out for the default"
        missing = "give it a value" if error["type"] == "missing" else keep
        yield Violation(path, f"{path} = {show(value)}", origin, rule, missing)


def _group_of(model: type[BaseModel], names: list[str]) -> type[BaseModel]:
    """The nested model at the end of `names`, or the last one on the way there."""
    for name in names:
        info = model.model_fields.get(name)
        kind = info.annotation if info is not None else None
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            model = kind
    return model


def _longest_known(base: str, location: list[str], merged: MergedConfig) -> str:
    """The path that was given, of those that a location of pydantic's starts with; else the first option in it."""
    paths = [".".join([base, *location[:depth]]) for depth in range(len(location), 0, -1)]
    return next((path for path in paths if path in merged.stacks), paths[-1] if paths else base)


def _leaves(model: BaseModel, prefix: str) -> Iterator[tuple[str, object]]:
    """Every option with its path, in the order of declaration."""
    for name in type(model).model_fields:
        value = getattr(model, name)
        if isinstance(value, BaseModel):
            yield from _leaves(value, f"{prefix}.{name}")
        else:
            yield f"{prefix}.{name}", frozen_or_text(value)
