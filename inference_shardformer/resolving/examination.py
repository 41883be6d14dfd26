"""Examines what was asked for one model and one set of ranks: decides everything, or says all that is wrong with it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import TYPE_CHECKING, NamedTuple, NoReturn

import torch

from inference_shardformer.attention.block_size import USUAL_BLOCK_SIZE, choose_block_size
from inference_shardformer.attention.groups import LayerGroups
from inference_shardformer.attention.selecting import TypedOptions, chosen_names
from inference_shardformer.attention.selector import Selection
from inference_shardformer.attention.survey import Survey, make_survey
from inference_shardformer.config.effects import ConfigEvent, event_of, idle, idle_values
from inference_shardformer.config.loader import MergedConfig, merge_layers
from inference_shardformer.config.model import ModelFacts
from inference_shardformer.config.origins import Level, Origin
from inference_shardformer.config.resolved import CACHE_DTYPES, TORCH_DTYPES, ResolvedConfig
from inference_shardformer.config.sources import Layers
from inference_shardformer.config.violations import ConfigViolations, Violation, raise_all, show
from inference_shardformer.errors import BackendUnavailableError, InferenceShardformerError, PluginError, PolicyError
from inference_shardformer.policies.base import Policy
from inference_shardformer.policies.facts import token_ids
from inference_shardformer.policies.registry import policy_for
from inference_shardformer.resolving.graphs import choose_graphs
from inference_shardformer.resolving.kernels import ChosenKernels, choose_kernels
from inference_shardformer.resolving.options import (
    ChosenOptions,
    bind_policy,
    check_options,
    chosen_options,
    idle_options,
    policy_options,
)
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
from inference_shardformer.tuning.selecting import select_backends

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_LOGGER = logging.getLogger(__name__)

Eos = int | list[int] | None


class ModelSource(NamedTuple):
    """A model before its weights: its configuration, its architecture, and the policy that was given for it.

    A model in memory also has the type of its weights, whatever its configuration says.
    """

    hf_config: PreTrainedConfig
    architecture: str
    eos: Eos
    policy: Policy | None = None
    weights_dtype: torch.dtype | None = None


@dataclass(frozen=True)
class Examined:
    """Everything that is decided without ranks and weights; `selections` has one for each group of layers.

    `options` are those of the chosen backends by their names.
    """

    policy: Policy
    facts: ModelFacts
    hf_config: PreTrainedConfig
    config: ResolvedConfig
    groups: LayerGroups
    selections: tuple[Selection, ...]
    options: TypedOptions
    kernels: ChosenKernels
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
        policy = bind_policy(source.policy or policy_for(source.architecture), merge_layers(layers))
        facts = replace(policy.facts(source.hf_config), eos_token_ids=token_ids(source.eos))
        if source.weights_dtype is not None:
            names = {dtype: name for name, dtype in TORCH_DTYPES.items()}
            facts = replace(facts, checkpoint_dtype=names.get(source.weights_dtype))
    except ConfigViolations:
        raise
    except InferenceShardformerError as exc:
        raise_all([*merge_layers(layers).violations, *found, _of_model(exc)])
        raise
    merged = merge_layers(with_preset(layers, policy, facts))
    layout = RankLayout(host.tp_size, tp_rank)
    survey = cache(partial(make_survey, device))  # made once, and only if somebody asks
    wrong_options = check_options(merged, policy=policy)
    violations = [*merged.violations, *found, *wrong_options, *_model_rules(merged, policy, facts, host)]
    try:
        groups = layer_groups(policy, facts, merged, layout, device, survey)
    except PolicyError as exc:
        raise_all([*violations, _of_model(exc)])
        raise
    selections = _select(groups, merged, survey, violations)
    chosen = {"attention": " + ".join(chosen_names(selections)), "all_reduce": host.all_reduce.name}
    dtype = groups.specs[0].dtype
    kernels = choose_kernels(
        merged,
        facts,
        policy,
        device=device,
        dtype=dtype,
        kv_dtype=groups.specs[0].kv_dtype,
        chosen=chosen,
        violations=violations,
    )
    graphs = choose_graphs(
        merged,
        facts,
        policy,
        device=device,
        backends=chosen_names(selections),
        all_reduce=host.all_reduce.name,
        experts=kernels.spec.chosen.get("experts", "torch"),
        violations=violations,
    )
    idle = idle_values(merged, facts, resolve_length(merged.inference, facts)[0], groups.specs[0].block_size)
    idle += _idle_all_reduce(merged, host)
    idle += idle_options(merged, chosen_names(selections), policy) if selections else []
    if merged.inference.strict:
        known = {violation.path for violation in violations}
        violations += [violation for violation in idle if violation.path not in known]
    raise_all(violations)
    if not selections:
        raise BackendUnavailableError("no attention backend was selected", remedy="report this")
    options = {name: chosen_options(merged, name) for name in chosen_names(selections)}
    leaves = policy_options(merged, policy).leaves | _leaves(options)
    backend, block_size = _backend(groups, selections), _block_size(groups, selections)
    choices = Choices(backend, leaves, kernels.decided(), block_size, graphs, kernels.compression())
    config = resolve(merged, facts=facts, host=host, choices=choices)
    typed = {name: each.typed for name, each in options.items()}
    events = _told(idle, tp_rank)
    return Examined(policy, facts, source.hf_config, config, groups, selections, typed, kernels, events)


def layer_groups(
    policy: Policy,
    facts: ModelFacts,
    merged: MergedConfig,
    layout: RankLayout,
    device: torch.device,
    survey: Callable[[], Survey],
) -> LayerGroups:
    """What the layers of one rank need; an automatic block size is chosen by what `survey` finds.

    Raises `PolicyError` where the policy says what one cache cannot hold.
    """
    dtype = TORCH_DTYPES[resolve_dtype(merged.inference, facts).value]
    kv_dtype = CACHE_DTYPES[merged.inference.cache.dtype]
    groups_of = partial(_groups_of, policy, facts, layout, dtype, device, kv_dtype)
    block_size = merged.inference.cache.block_size
    if block_size == "auto":
        block_size = choose_block_size(merged.inference.attention.backend, groups_of, survey())
    return groups_of(block_size)


def _groups_of(
    policy: Policy,
    facts: ModelFacts,
    layout: RankLayout,
    dtype: torch.dtype,
    device: torch.device,
    kv_dtype: torch.dtype | None,
    block_size: int,
) -> LayerGroups:
    groups = policy.attention_groups(facts, layout, dtype=dtype, device=device, block_size=block_size)
    return groups.stored_in(kv_dtype)


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


def _select(
    groups: LayerGroups, merged: MergedConfig, survey: Callable[[], Survey], violations: list[Violation]
) -> tuple[Selection, ...]:
    """A backend for each group of layers, or none and a violation. An impossible split asks no backend."""
    if any(isinstance(violation.error, PolicyError) for violation in violations):
        return ()
    path = "inference.attention.backend"
    try:
        return select_backends(groups, merged.inference.attention, survey())
    except (BackendUnavailableError, PluginError, TuningProfileError) as exc:
        given = f"{path} = {show(merged.value(path))}"
        violations.append(Violation(path, given, merged.origin(path), _rule(exc), exc.remedy, exc))
        return ()


def _backend(groups: LayerGroups, selections: Sequence[Selection]) -> Decided:
    """The chosen backends and why; the layers of each where there are several."""
    names = chosen_names(selections)
    if len(names) == 1:
        return Decided(names[0], selections[0].reason or "the first candidate without a reason against it")
    parts = [
        f"{groups.named(group)}: {selection.name}" + (f", {selection.reason}" if selection.reason else "")
        for group, selection in enumerate(selections)
    ]
    return Decided(" + ".join(names), "; ".join(parts))


def _block_size(groups: LayerGroups, selections: Sequence[Selection]) -> tuple[int, str]:
    """The size of a block and why."""
    size = groups.specs[0].block_size
    usual = "the usual size, which the attention backend serves"
    needed = f"the least that attention backend {chosen_names(selections)[0]} takes"
    return size, usual if size == USUAL_BLOCK_SIZE else needed


def _leaves(options: Mapping[str, ChosenOptions]) -> dict[str, object]:
    """The values of all options by their path."""
    return {path: value for each in options.values() for path, value in each.leaves.items()}


def _idle_all_reduce(merged: MergedConfig, host: HostFacts) -> list[Violation]:
    """A way to add partial sums up, where there is one rank."""
    path = "shard.all_reduce"
    asked = merged.value(path)
    if asked in ("auto", "none") or host.tp_size > 1:
        return []
    return [idle(path, asked, merged, "one rank has nothing to add up", "remove it, or use several ranks")]


def _rule(error: InferenceShardformerError) -> str:
    return f"possible for this model: {error.message}"


def _told(idle: Sequence[Violation], tp_rank: int) -> tuple[ConfigEvent, ...]:
    """The events of what was let pass, each told once, on the main rank."""
    events = tuple(event_of(violation) for violation in idle)
    for event in events if tp_rank == 0 else ():
        _LOGGER.warning("%s [%s]", event.message, event.code)
    return events
