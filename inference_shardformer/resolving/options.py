"""Options of attention backends: validated by the backend that declares them, like settings of our own."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from pydantic import BaseModel, ValidationError

from inference_shardformer.attention.base import AttentionBackend
from inference_shardformer.attention.survey import BACKENDS
from inference_shardformer.config.effects import idle
from inference_shardformer.config.frozen import frozen_or_text
from inference_shardformer.config.loader import MergedConfig
from inference_shardformer.config.rules import rule_of
from inference_shardformer.config.violations import Violation, show
from inference_shardformer.errors import PluginError
from inference_shardformer.plugins import Registry

PATH = "inference.attention.options"
Backends = Registry[type[AttentionBackend]]


@dataclass(frozen=True)
class ChosenOptions:
    """The options of the chosen backend: typed, and every one of them by its path. `None`: it declares none."""

    typed: BaseModel | None
    leaves: Mapping[str, object]


def check_options(merged: MergedConfig, registry: Backends = BACKENDS) -> list[Violation]:
    """Everything that is wrong with the options of any backend, whether it is chosen or not."""
    return [
        violation for name in merged.inference.attention.options for violation in _check_backend(name, merged, registry)
    ]


def idle_options(merged: MergedConfig, chosen: str) -> list[Violation]:
    """Options of backends that are not the chosen one, which cannot take effect."""
    return [
        idle(path, stack.winner.value, merged, f"the attention backend is {chosen}", "remove it, or name its backend")
        for path, stack in merged.stacks.items()
        if path.startswith(f"{PATH}.") and not path.startswith(f"{PATH}.{chosen}.")
    ]


def chosen_options(merged: MergedConfig, chosen: str, registry: Backends = BACKENDS) -> ChosenOptions:
    """The options of the chosen backend, which must have passed `check_options`."""
    model = registry.get(chosen).Options
    if model is None:
        return ChosenOptions(None, {})
    typed = model.model_validate(merged.inference.attention.options.get(chosen, {}))
    return ChosenOptions(typed, dict(_leaves(typed, f"{PATH}.{chosen}")))


def _check_backend(name: str, merged: MergedConfig, registry: Backends) -> Iterator[Violation]:
    if name not in registry.names():
        yield from _each(
            name, merged, f"of a known backend: {registry.unknown(name)}", "correct the name, or install the backend"
        )
        return
    try:
        model = registry.get(name).Options
    except PluginError as exc:
        yield from _each(name, merged, f"of a backend that loads: {exc.message}", exc.remedy)
        return
    if model is None:
        yield from _each(name, merged, f"left out: attention backend {name} takes no options", "remove it")
        return
    try:
        model.model_validate(merged.inference.attention.options[name])
    except ValidationError as exc:
        yield from _refused(exc, name, model, merged)


def _each(name: str, merged: MergedConfig, rule: str, remedy: str) -> Iterator[Violation]:
    """The same violation for every option given to one backend."""
    for path, stack in merged.stacks.items():
        if path.startswith(f"{PATH}.{name}."):
            given = f"{path} = {show(stack.winner.value)}"
            yield Violation(path, given, stack.winner.origin, rule, remedy)


def _refused(exc: ValidationError, name: str, model: type[BaseModel], merged: MergedConfig) -> Iterator[Violation]:
    """One violation per refused option; pydantic reports a field of several kinds once per kind."""
    seen: set[str] = set()
    for error in exc.errors(include_url=False):
        location = [str(part) for part in error["loc"]]
        base = f"{PATH}.{name}"
        path = _longest_known(base, location, merged)
        if path in seen:
            continue
        seen.add(path)
        origin = merged.origin(path)
        if error["type"] == "extra_forbidden":
            near = difflib.get_close_matches(location[-1], model.model_fields, n=1)
            known = f"the name of an option of attention backend {name}: {', '.join(model.model_fields)}"
            yield Violation(path, path, origin, known, f"did you mean {base}.{near[0]}?" if near else "remove it")
            continue
        info = model.model_fields.get(location[0]) if len(location) > 0 else None
        rule = rule_of(info) if info is not None and error["type"] != "value_error" else str(error["msg"])
        value = merged.stacks[path].winner.value if path in merged.stacks else error["input"]
        keep = "change it there, or leave it out for the default"
        missing = "give it a value" if error["type"] == "missing" else keep
        yield Violation(path, f"{path} = {show(value)}", origin, rule, missing)


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
