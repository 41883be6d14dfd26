"""The preset of a model family: the level between the defaults and everything that a user says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from inference_shardformer.config.fields import all_fields, full_path, open_field
from inference_shardformer.config.layers import Assignment, names_option
from inference_shardformer.config.model import ModelFacts
from inference_shardformer.config.origins import Level, Origin
from inference_shardformer.config.sources import Layers
from inference_shardformer.config.violations import Violation, show, unknown_key
from inference_shardformer.policies.base import Policy

_LEFT_TO_USERS = ("shard.", "inference.weights.", "inference.strict")


def with_preset(layers: Layers, policy: Policy, facts: ModelFacts) -> Layers:
    """The layers with the policy's preset below them."""
    violations: list[Violation] = []
    origin = Origin(Level.PRESET, type(policy).__name__)
    assignments = tuple(_assignments(policy.preset(facts), origin, violations))
    return Layers((*assignments, *layers.assignments), (*violations, *layers.violations))


def _assignments(preset: Mapping[str, object], origin: Origin, violations: list[Violation]) -> Iterator[Assignment]:
    for name, value in preset.items():
        path = full_path(name)
        owner = open_field(path)
        if path.startswith(_LEFT_TO_USERS):
            given = f"{path} = {show(value)}"
            rule = "left out of a preset: the layout of the ranks, permissions and strictness are for users alone"
            violations.append(Violation(path, given, origin, rule, f"remove it from {origin.where}.preset()"))
        elif path not in all_fields() and owner is None:
            violations.append(unknown_key(name, origin))
        elif owner is not None and not names_option(owner, path):
            violations.append(Violation(path, path, origin, owner.rule, f"name an option: {owner.path}.NAME.OPTION"))
        else:
            yield Assignment(path, value, origin)
