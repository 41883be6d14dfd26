"""Which features of an unsharded module a module of one rank holds, read from the plan."""

from __future__ import annotations

from typing import NamedTuple

from inference_shardformer.sharding.plan import ModulePlan, ParameterPlan, ShardingPlan
from inference_shardformer.verification.reference import Reference


class Part(NamedTuple):
    """Features `[start, stop)` of the native `module` lie at `offset` here."""

    module: str
    start: int
    stop: int
    offset: int


class Features(NamedTuple):
    """What a module takes in and gives out; `None` stands for the whole of what `native` does.

    `width` is the number of features the parts are parts of: what comes out differently was changed on the way.
    """

    native: str
    inputs: tuple[Part, ...] | None = None
    outputs: tuple[Part, ...] | None = None
    width: int = 0


def features_of(plan: ShardingPlan, reference: Reference) -> dict[str, Features]:
    """The features of every planned module, by its path."""
    by_path = {module.path: module for module in plan.modules}
    found = {}
    for path, module in by_path.items():
        owner = by_path[module.tied_to] if module.tied_to else module
        weight = _weight(owner)
        if weight is not None:
            found[path] = _features(path, module, weight, reference)
    return found


def _weight(module: ModulePlan) -> ParameterPlan | None:
    """The matrix of a module, if it has one."""
    named = [parameter for parameter in module.parameters if parameter.name == f"{module.path}.weight"]
    return named[0] if named and len(named[0].shape) == 2 else None


def _features(path: str, module: ModulePlan, weight: ParameterPlan, reference: Reference) -> Features:
    sources = list(dict.fromkeys(part.tensor.rpartition(".")[0] for part in weight.slices))
    native = path if module.tied_to or path in reference.activations or not sources else sources[0]
    dims = {part.dim for part in weight.slices}
    if len(dims) != 1 or reference.is_embedding(native):
        return Features(native)
    parts = tuple(
        Part(native if module.tied_to else part.tensor.rpartition(".")[0], part.start, part.stop, part.offset)
        for part in weight.slices
    )
    is_output = (dims == {0}) != reference.is_transposed(native)
    if is_output:
        return Features(native, outputs=parts, width=weight.shape[dims.pop()])
    return Features(native, inputs=parts, width=weight.shape[dims.pop()])
