"""Transactions: an update of several fields, validated as a whole. Pure; nothing here has state or calls back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from operator import attrgetter
from typing import cast

from pydantic import BaseModel, ValidationError

from inference_shardformer.config.changes import ConfigChange, PendingUpdate
from inference_shardformer.config.fields import ROOTS, all_fields, all_groups, full_path, open_field
from inference_shardformer.config.inference import InferenceConfig
from inference_shardformer.config.layers import Assignment, misused_group, nest
from inference_shardformer.config.mutability import is_live, why_init_only
from inference_shardformer.config.origins import Level, Origin
from inference_shardformer.config.resolved import Beaten, Decision, ResolvedConfig, with_decision
from inference_shardformer.config.shard import ShardConfig
from inference_shardformer.config.snapshot import ConfigSnapshot
from inference_shardformer.config.violations import ConfigViolations, Violation, show, unknown_key


def check_names(changes: Mapping[str, object], source: str) -> None:
    """Raise one ConfigError for all names that are unknown, init-only or given twice."""
    _, violations = _named(changes, _origin(source))
    if violations:
        raise ConfigViolations(violations)


def first_snapshot(config: ResolvedConfig) -> ConfigSnapshot:
    """Epoch 0. Raises ConfigError if what was decided breaks a rule between fields."""
    try:
        return ConfigSnapshot(0, config)
    except ValidationError as exc:
        raise ConfigViolations(list(_violations_of(exc, {}, Origin(Level.CALL, "resolved")))) from exc


def plan_update(snapshot: ConfigSnapshot, changes: Mapping[str, object], source: str) -> PendingUpdate:
    """What the update makes of `snapshot`. Raises one ConfigError that holds every violation."""
    origin = _origin(source)
    found, violations = _named(changes, origin)
    models: dict[str, BaseModel] = {}
    for root in ROOTS:
        try:
            models[root] = _validated(getattr(snapshot.config, root), nest(found.values(), root))
        except ValidationError as exc:
            violations.extend(_violations_of(exc, found, origin))
    if violations:
        raise ConfigViolations(violations)
    changed = tuple(_changes(snapshot, models, found, source))
    if not changed:
        return PendingUpdate((), snapshot)
    config = replace(
        snapshot.config,
        shard=cast(ShardConfig, models["shard"]),
        inference=cast(InferenceConfig, models["inference"]),
        decisions=_decisions(snapshot.config, changed),
    )
    try:
        return PendingUpdate(changed, ConfigSnapshot(snapshot.epoch + 1, config))
    except ValidationError as exc:  # a rule between what is asked and what was decided
        raise ConfigViolations(list(_violations_of(exc, found, origin))) from exc


def plan_decision(snapshot: ConfigSnapshot, path: str, value: object, source: str) -> ConfigSnapshot:
    """The next epoch, in which a decided field has another value; `snapshot` itself if it has that value.

    Raises ConfigError if the value breaks a rule.
    """
    if snapshot[path] == value:
        return snapshot
    change = ConfigChange(path, snapshot[path], value, snapshot.epoch + 1, source)
    decided = with_decision(snapshot.config, path, value, "")
    try:
        return ConfigSnapshot(change.epoch, replace(decided, decisions=_decisions(snapshot.config, (change,))))
    except ValidationError as exc:
        raise ConfigViolations(list(_violations_of(exc, {}, _origin(source)))) from exc


def _changes(
    snapshot: ConfigSnapshot, models: Mapping[str, BaseModel], found: Mapping[str, Assignment], source: str
) -> Iterator[ConfigChange]:
    """What differs, in the order of declaration. A live field is never decided: what is asked is what holds."""
    for path in all_fields():
        if path in found:
            root, _, rest = path.partition(".")
            old, new = snapshot[path], attrgetter(rest)(models[root])
            if old != new:
                yield ConfigChange(path, old, new, snapshot.epoch + 1, source)


def _origin(source: str) -> Origin:
    """Where the values of an update come from."""
    return Origin(Level.CALL, f"of update(), source {source}")


def _named(changes: Mapping[str, object], origin: Origin) -> tuple[dict[str, Assignment], list[Violation]]:
    """The live assignments by full path, and a violation for every other name."""
    found: dict[str, Assignment] = {}
    violations: list[Violation] = []
    for name, value in changes.items():
        path = full_path(name)
        if path in all_groups():
            violations.append(misused_group(path, value, origin))
        elif (owner := open_field(path)) is not None:
            violations.append(_init_only(path, value, origin, field=owner.path))
        elif path not in all_fields():
            violations.append(unknown_key(name, origin))
        elif not is_live(path):
            violations.append(_init_only(path, value, origin, field=path))
        elif path in found:
            rule = f"given once, and {show(found[path].value)} is given too"
            violations.append(Violation(path, f"{path} = {show(value)}", origin, rule, "drop one of the two spellings"))
        else:
            found[path] = Assignment(path, value, origin)
    return found, violations


def _init_only(path: str, value: object, origin: Origin, *, field: str) -> Violation:
    """A path in a field that is set once, which is the path itself unless it names an option of a plug-in."""
    return Violation(
        path=path,
        given=f"{path} = {show(value)}",
        origin=origin,
        rule=f"set before the engine is built (init_only): {why_init_only(field)}",
        remedy="close this engine and build one with the new value",
    )


def _validated(model: BaseModel, tree: Mapping[str, object]) -> BaseModel:
    """`model` with the values of `tree`, validated with all of its rules; the same object if there are none."""
    return type(model).model_validate(_overlaid(model, tree)) if tree else model


def _overlaid(model: BaseModel, tree: Mapping[str, object]) -> dict[str, object]:
    """The fields of `model` with those of `tree` in their place; untouched groups stay validated objects."""
    fields = dict(model.__dict__)
    for name, value in tree.items():
        below = fields[name]
        fields[name] = _overlaid(below, value) if isinstance(below, BaseModel) and isinstance(value, dict) else value
    return fields


def _violations_of(exc: ValidationError, found: Mapping[str, Assignment], origin: Origin) -> Iterator[Violation]:
    """One violation per refused field, and one for every rule between fields that is broken."""
    root = "shard" if exc.title == ShardConfig.__name__ else "inference"
    seen: set[str] = set()
    for error in exc.errors(include_url=False):
        path = _known_path(root, error["loc"])
        if path in seen:
            continue
        seen.add(path)
        own_rule = str(error["ctx"]["error"]) if error["type"] == "value_error" else ""
        if path in found:
            rule = own_rule or all_fields()[path].rule
            given = f"{path} = {show(found[path].value)}"
            yield Violation(
                path, given, origin, rule, "choose a value within the rule, or leave it out to keep the current"
            )
        else:
            given = ", ".join(f"{name} = {show(value)}" for name, value, _ in found.values()) or path
            yield Violation(
                path, given, origin, own_rule or error["msg"], "change these together so that the rule holds"
            )


def _known_path(root: str, location: tuple[int | str, ...]) -> str:
    """The path of the field or group that a location of pydantic's lies in."""
    path = ".".join([root, *map(str, location)])
    while path not in all_fields() and path not in all_groups():
        path = path.rpartition(".")[0]
    return path


def _decisions(before: ResolvedConfig, changes: tuple[ConfigChange, ...]) -> tuple[Decision, ...]:
    """The decisions of the new epoch: those of the changed fields tell of the update."""
    changed = {change.path: change for change in changes}
    return tuple(
        _updated(decision, changed[decision.path]) if decision.path in changed else decision
        for decision in before.decisions
    )


def _updated(decision: Decision, change: ConfigChange) -> Decision:
    """What an update beats is what the engine was built with, never an earlier update."""
    origin = Origin(Level.UPDATE, f"of epoch {change.epoch}, source {change.source}")
    beaten = decision.beaten
    if decision.origin.level < Level.UPDATE:
        beaten = (Beaten(decision.value, decision.origin), *beaten)
    return replace(decision, value=change.new, origin=origin, reason="", beaten=beaten)
