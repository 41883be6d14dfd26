"""Examines what was asked for one model and one set of ranks: decides everything, or says all that is wrong with it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple, NoReturn

import torch

from inference_shardformer.attention.base import AttentionSpec
from inference_shardformer.attention.selector import Selection
from inference_shardformer.attention.survey import make_survey
from inference_shardformer.config.effects import ConfigEvent, event_of, idle_values
from inference_shardformer.config.loader import MergedConfig, merge_layers
from inference_shardformer.config.model import ModelFacts
from inference_shardformer.config.origins import Level, Origin
from inference_shardformer.config.resolved import TORCH_DTYPES, ResolvedConfig
from inference_shardformer.config.sources import Layers
from inference_shardformer.config.violations import Violation, raise_all, show
from inference_shardformer.errors import BackendUnavailableError, InferenceShardformerError, PluginError, PolicyError
from inference_shardformer.policies.base import Policy
from inference_shardformer.policies.facts import token_ids
from inference_shardformer.policies.registry import policy_for
from inference_shardformer.resolving.options import ChosenOptions, check_options, chosen_options, idle_options
from inference_shardformer.resolving.presets import with_preset
from inference_shardformer.resolving.resolution import (
    Choices,
    Decided,
    HostFacts,
    resolve,
    resolve_dtype,
    resolve_length,
)
from inference_shardformer.sharding.plan import RankLayout
from inference_shardformer.tuning.errors import TuningProfileError
from inference_shardformer.tuning.selecting import select_backend

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_LOGGER = logging.getLogger(__name__)

Eos = int | list[int] | None


class ModelSource(NamedTuple):
    """A model before its weights: its configuration, its architecture, and the policy that was given for it."""

    hf_config: PreTrainedConfig
    architecture: str
    eos: Eos
    policy: Policy | None = None


@dataclass(frozen=True)
class Examined:
    """Everything that is decided without ranks and weights."""

    policy: Policy
    facts: ModelFacts
    hf_config: PreTrainedConfig
    config: ResolvedConfig
    spec: AttentionSpec
    selection: Selection
    options: ChosenOptions
    events: tuple[ConfigEvent, ...]


def examine(
    layers: Layers,
    read_model: Callable[[], ModelSource],
    host: HostFacts,
    *,
    device: torch.device,
    tp_rank: int = 0,
    found: Sequence[Violation] = (),
) -> Examined:
    """Decide every value, or raise one error for everything that is wrong; `found` is what was wrong before.

    A single violation that has an error of its own class raises that one, several raise `ConfigViolations`.
    """
    try:
        source = read_model()
        policy = source.policy or policy_for(source.architecture)
        facts = replace(policy.facts(source.hf_config), eos_token_ids=token_ids(source.eos))
    except InferenceShardformerError as exc:
        raise_all([*merge_layers(layers).violations, *found, _of_model(exc)])
        raise
    merged = merge_layers(with_preset(layers, policy, facts))
    layout = RankLayout(host.tp_size, tp_rank)
    violations = [*merged.violations, *found, *check_options(merged), *_model_rules(merged, policy, facts, host)]
    spec = policy.attention_spec(
        facts,
        layout,
        dtype=TORCH_DTYPES[resolve_dtype(merged.inference, facts).value],
        device=device,
        block_size=merged.inference.cache.block_size,
    )
    selection = _select(spec, merged, violations)
    idle = idle_values(merged, facts, resolve_length(merged.inference, facts)[0])
    idle += idle_options(merged, selection.name) if selection else []
    if merged.inference.strict:
        known = {violation.path for violation in violations}
        violations += [violation for violation in idle if violation.path not in known]
    raise_all(violations)
    if selection is None:
        raise BackendUnavailableError("no attention backend was selected", remedy="report this")
    options = chosen_options(merged, selection.name)
    backend = Decided(selection.name, selection.reason or "the first candidate without a reason against it")
    config = resolve(merged, facts=facts, host=host, choices=Choices(backend, options.leaves))
    return Examined(policy, facts, source.hf_config, config, spec, selection, options, _told(idle, tp_rank))


def refuse(layers: Layers, read_model: Callable[[], ModelSource], error: InferenceShardformerError) -> NoReturn:
    """Raise what keeps the ranks from being joined, together with everything else that is wrong."""
    merged = merge_layers(layers)
    asked = merged.shard.tp_size
    path = "shard.device" if "shard.device" in error.message else "shard.tp_size"
    rule = f"what the ranks and devices of this run allow: {error.message}"
    given = f"{path} = {show(merged.value(path))}"
    violation = Violation(path, given, merged.origin(path), rule, error.remedy, error)
    tp_size = 1 if asked == "auto" else asked
    host = HostFacts(tp_size, tp_size, "cpu", "")
    examine(layers, read_model, host, device=torch.device("cpu"), found=[violation])
    raise error


def _of_model(error: InferenceShardformerError) -> Violation:
    """What is wrong with the model, as one of several violations."""
    origin = Origin(Level.CALL, "of the model")
    return Violation("model", error.message, origin, "a model that can be served", error.remedy, error)


def _model_rules(merged: MergedConfig, policy: Policy, facts: ModelFacts, host: HostFacts) -> list[Violation]:
    """Rules that depend on the model and the number of ranks."""
    found = []
    try:
        policy.check_tp_size(facts, host.tp_size)
    except PolicyError as exc:
        given = f"shard.tp_size = {host.tp_size}"
        found.append(Violation("shard.tp_size", given, merged.origin("shard.tp_size"), _rule(exc), exc.remedy, exc))
    context, path = facts.max_position_embeddings, "inference.max_model_len"
    length = merged.inference.max_model_len
    if isinstance(length, int) and length > context:
        found.append(
            Violation(
                path=path,
                given=f"{path} = {length}",
                origin=merged.origin(path),
                rule=f"at most {context}, the model's context in tokens",
                remedy=f"use at most {context}, or a checkpoint with scaled rotary embeddings",
            )
        )
    return found


def _select(spec: AttentionSpec, merged: MergedConfig, violations: list[Violation]) -> Selection | None:
    """The attention backend; `None`, and a violation, if there is none. An impossible split asks no backend."""
    if any(isinstance(violation.error, PolicyError) for violation in violations):
        return None
    path = "inference.attention.backend"
    try:
        return select_backend(spec, merged.inference.attention, make_survey(spec.device))
    except (BackendUnavailableError, PluginError, TuningProfileError) as exc:
        given = f"{path} = {show(merged.value(path))}"
        violations.append(Violation(path, given, merged.origin(path), _rule(exc), exc.remedy, exc))
        return None


def _rule(error: InferenceShardformerError) -> str:
    return f"possible for this model: {error.message}"


def _told(idle: Sequence[Violation], tp_rank: int) -> tuple[ConfigEvent, ...]:
    """The events of what was let pass, each told once, on the main rank."""
    events = tuple(event_of(violation) for violation in idle)
    for event in events if tp_rank == 0 else ():
        _LOGGER.warning("%s [%s]", event.message, event.code)
    return events
