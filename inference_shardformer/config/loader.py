"""The resolver of levels: every source becomes assignments, the highest wins, pydantic validates the result once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import cast

from pydantic import BaseModel, ValidationError

from inference_shardformer.config.calls import call_assignments
from inference_shardformer.config.fields import ROOTS, all_fields, all_groups, open_field
from inference_shardformer.config.inference import InferenceConfig
from inference_shardformer.config.layers import Assignment, Stack, merge, nest
from inference_shardformer.config.origins import DEFAULT, Origin
from inference_shardformer.config.shard import ShardConfig
from inference_shardformer.config.sources import ConfigSources, Layers, read_sources
from inference_shardformer.config.violations import Violation, raise_all, refused_value


@dataclass(frozen=True)
class MergedConfig:
    """The winners of all levels, and every level that they beat.

    Where `violations` tell of refused values, the defaults stand in their place and `refused` names their paths.
    """

    shard: ShardConfig
    inference: InferenceConfig
    stacks: Mapping[str, Stack]
    violations: tuple[Violation, ...]
    refused: frozenset[str]

    def origin(self, path: str) -> Origin:
        """Where the value of a field comes from."""
        return self.stacks[path].winner.origin if path in self.stacks else DEFAULT

    def value(self, path: str) -> object:
        """The value of a field."""
        found: object = attrgetter(path)(self)
        return found

    def beaten(self, path: str) -> tuple[Assignment, ...]:
        """What the value of a field beats, the strongest first and the default, if there is one, last."""
        if path not in self.stacks:
            return ()
        known = all_fields().get(path)
        default = () if known is None else (Assignment(path, known.default, DEFAULT),)
        return (*self.stacks[path].beaten, *default)


def gather(
    sources: ConfigSources | None = None,
    shard: ShardConfig | None = None,
    inference: InferenceConfig | None = None,
) -> Layers:
    """Everything that was said at all levels but the preset's and the requests'. Raises nothing.

    Without `sources` only the environment is read; fields given to `shard` and `inference` are the call's level.
    """
    said = read_sources(ConfigSources() if sources is None else sources)
    called = call_assignments(shard or ShardConfig(), inference or InferenceConfig())
    return Layers((*said.assignments, *called), said.violations)


def merge_layers(layers: Layers) -> MergedConfig:
    """Let the highest level win everywhere and validate the result. Raises nothing."""
    stacks = merge(layers.assignments)
    violations = list(layers.violations)
    refused: set[str] = set()
    models: dict[str, BaseModel] = {}
    for root, model in ROOTS.items():
        winners = {path: stack.winner for path, stack in stacks.items() if path.startswith(f"{root}.")}
        models[root] = _validate(model, root, winners, violations, refused)
    return MergedConfig(
        cast(ShardConfig, models["shard"]),
        cast(InferenceConfig, models["inference"]),
        stacks,
        tuple(violations),
        frozenset(refused),
    )


def load_config(
    sources: ConfigSources | None = None,
    shard: ShardConfig | None = None,
    inference: InferenceConfig | None = None,
) -> MergedConfig:
    """`gather` and `merge_layers`; raises one error that holds every violation of every source."""
    merged = merge_layers(gather(sources, shard, inference))
    raise_all(merged.violations)
    return merged


def _validate(
    model: type[BaseModel], root: str, winners: dict[str, Assignment], violations: list[Violation], refused: set[str]
) -> BaseModel:
    """The validated model of one root. What is refused is told, and the rest validated without it."""
    for _ in range(2):
        try:
            return model.model_validate(nest(winners.values(), root))
        except ValidationError as exc:
            found = list(_violations_of(exc, root, winners))
        violations += found
        refused.update(violation.path for violation in found)
        winners = {path: item for path, item in winners.items() if not _is_below(path, refused)}
    return model()  # two rules between fields that hinder each other


def _is_below(path: str, refused: Iterable[str]) -> bool:
    """Whether a refused field or group is, or holds, this path."""
    return any(f"{path}.".startswith(f"{name}.") for name in refused)


def _violations_of(exc: ValidationError, root: str, winners: Mapping[str, Assignment]) -> Iterator[Violation]:
    """One violation per refused field; pydantic reports a field of several kinds once per kind."""
    seen: set[str] = set()
    for error in exc.errors(include_url=False):
        path = _field_path(root, error["loc"], winners)
        if path in seen:
            continue
        seen.add(path)
        own_rule = str(error["ctx"]["error"]) if error["type"] == "value_error" else ""
        if path in winners and path in all_fields():
            _, value, origin = winners[path]
            yield refused_value(path, value, origin, rule=own_rule)
        else:
            yield Violation(path, path, DEFAULT, own_rule or error["msg"], "change the settings that the rule names")


def _field_path(root: str, location: Iterable[int | str], winners: Mapping[str, Assignment]) -> str:
    """The longest path of a field, a group or an option at the start of a location of pydantic's."""
    path = root
    for part in location:
        longer = f"{path}.{part}"
        if longer not in all_fields() and longer not in all_groups() and open_field(longer) is None:
            break
        path = longer
        if path in winners:
            break
    return path
