"""Selections for the groups of layers of a model: each is chosen for alone, and a refusal names the layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from pydantic import BaseModel

from inference_shardformer.attention.base import AttentionBackend, AttentionSpec
from inference_shardformer.attention.groups import LayerGroups
from inference_shardformer.attention.layered import LayeredAttention
from inference_shardformer.attention.selector import Selection, build
from inference_shardformer.attention.survey import BACKENDS, BackendRegistry
from inference_shardformer.errors import InferenceShardformerError

Choose = Callable[[AttentionSpec], Selection]
TypedOptions = Mapping[str, BaseModel | None]  # by the name of a backend


def select_each(groups: LayerGroups, choose: Choose) -> tuple[Selection, ...]:
    """One selection for each group. Raises what `choose` raises, once for all groups that it refuses, naming them."""
    selections: list[Selection] = []
    refusals: dict[int, InferenceShardformerError] = {}
    for group, spec in enumerate(groups.specs):
        try:
            selections.append(choose(spec))
        except InferenceShardformerError as exc:
            refusals[group] = exc
    if refusals:
        raise _together(groups, refusals)
    return tuple(selections)


def build_each(
    groups: LayerGroups,
    selections: Sequence[Selection],
    *,
    options: TypedOptions,
    registry: BackendRegistry = BACKENDS,
    keep: Sequence[AttentionBackend] = (),
) -> LayeredAttention:
    """Construct and prove one backend for each group; a group whose backend in `keep` is the chosen one keeps it.

    Raises `BackendUnavailableError` naming the layers where a backend fails or differs from the reference.
    """
    backends: list[AttentionBackend] = []
    for group, (spec, selection) in enumerate(zip(groups.specs, selections, strict=True)):
        if group < len(keep) and keep[group].name == selection.name:
            backends.append(keep[group])
            continue
        try:
            backends.append(build(selection, spec, registry, options=options.get(selection.name)))
        except InferenceShardformerError as exc:
            raise _together(groups, {group: exc}) from exc.__cause__
    return LayeredAttention(groups, tuple(backends))


def chosen_names(selections: Sequence[Selection]) -> tuple[str, ...]:
    """The backends that were chosen, each once, in the order of the first layer they serve."""
    return tuple(dict.fromkeys(selection.name for selection in selections))


def _together(groups: LayerGroups, refusals: Mapping[int, InferenceShardformerError]) -> InferenceShardformerError:
    """One error for all refused groups, of the first one's type; layers are named where not all are refused alike."""
    first = next(iter(refusals.values()))
    messages = {error.message for error in refusals.values()}
    if len(refusals) == len(groups.specs) and len(messages) == 1:
        return first
    said = "\n".join(
        f"{groups.named(group)} ({groups.specs[group].in_words()}): {error.message}"
        for group, error in refusals.items()
    )
    remedies = "; ".join(dict.fromkeys(error.remedy for error in refusals.values()))
    return type(first)(said, remedy=remedies)
