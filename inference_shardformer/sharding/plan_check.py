"""Whether the slices of a plan file are sound by themselves, and whether the modules of a model compute with them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NoReturn

from inference_shardformer.errors import PlanFileError
from inference_shardformer.sharding.plan import ParameterPlan, ShardingPlan
from inference_shardformer.sharding.plan_document import REMAKE, ParameterEntry, PlanDocument, RankPart

_SHOWN = 3


def check_consistency(document: PlanDocument, plans: Sequence[ShardingPlan], name: str) -> None:
    """Modules and shapes as the model has them; slices in range, side by side, and together all of every tensor.

    Raises `PlanFileError` naming the first few places where that does not hold.
    """
    problems = list(_module_problems(document, plans))
    if not problems:
        for parameter, entry in document.parameters.items():
            problems += _parameter_problems(document, parameter, entry)
    if not problems:
        problems += _coverage_problems(document)
    if problems:
        _refuse(name, "it is not consistent", problems)


def check_arrangement(document: PlanDocument, plans: Sequence[ShardingPlan], name: str) -> None:
    """Within each replaced module the ranks' parts may be exchanged, all of its parameters alike; nothing else may be.

    A column of one parameter meets a row of another inside such a module, so a part of one alone would meet a foreign
    part. Raises `PlanFileError` for any other difference from what the policy plans.
    """
    owners = sorted((path for path, _ in plans[0].replaced), key=len)
    blocks: dict[str, list[ParameterPlan]] = {}
    for module in plans[0].modules:
        owner = next((path for path in owners if module.path.startswith(f"{path}.")), "")
        blocks.setdefault(owner, []).extend(module.parameters)
    problems = []
    for owner, parameters in blocks.items():
        names = [parameter.name for parameter in parameters]
        mine = [_parts(document, names, rank) for rank in range(document.tp_size)]
        policys = [_planned(plan, set(names)) for plan in plans]
        if mine == policys:
            continue
        if not owner:
            problems += [
                f"{name}: differs from what the policy plans"
                for place, name in enumerate(names)
                if [part[place] for part in mine] != [part[place] for part in policys]
            ]
        elif sorted(mine) != sorted(policys):
            problems.append(f"{owner}: the parts of its parameters do not belong together")
    if problems:
        _refuse(name, "it puts parts together that do not belong together", problems)


def _module_problems(document: PlanDocument, plans: Sequence[ShardingPlan]) -> Iterator[str]:
    """What is not as in the model's own plan: modules, parameters, shapes, ranks."""
    plan = plans[0]
    modules = {module.path: (module.row, module.style, module.tied_to) for module in plan.modules}
    owners = {parameter.name: module.path for module in plan.modules for parameter in module.parameters}
    found = {parameter: entry.module for parameter, entry in document.parameters.items()}
    for what, mine, theirs in (
        ("module", document.modules, modules),
        ("replaced module", document.replaced, dict(plan.replaced)),
        ("parameter", found, owners),
    ):
        yield from (f"{what} {path} is missing" for path in theirs if path not in mine)
        yield from (f"{what} {path} is not one of the model" for path in mine if path not in theirs)
        yield from (
            f"{what} {path} is {mine[path]} where the policy has {theirs[path]}"
            for path in theirs
            if path in mine and mine[path] != theirs[path]
        )
    if document.vocab_ranges != tuple(each.vocab_range for each in plans):
        yield f"vocab_ranges are {document.vocab_ranges} where the policy has {[each.vocab_range for each in plans]}"
    shapes = [{parameter.name: parameter.shape for parameter in each.parameters} for each in plans]
    for parameter, entry in document.parameters.items():
        if len(entry.ranks) != len(plans):
            yield f"{parameter}: has {len(entry.ranks)} rank(s), the plan {len(plans)}"
            continue
        for rank, part in enumerate(entry.ranks):
            if parameter in shapes[rank] and part.shape != shapes[rank][parameter]:
                given, needed = list(part.shape), list(shapes[rank][parameter])
                yield f"{parameter} on rank {rank}: its shape is {given}, the module needs {needed}"


def _parameter_problems(document: PlanDocument, parameter: str, entry: ParameterEntry) -> Iterator[str]:
    """Slices of one parameter that leave their tensor or their place, or lie over each other."""
    for rank, part in enumerate(entry.ranks):
        place = f"{parameter} on rank {rank}"
        outside = list(_outside(document, part))
        yield from (f"{place}: {problem}" for problem in outside)
        if outside:
            continue
        if len({dim for _, dim, *_ in part.slices}) > 1:
            yield f"{place}: its slices are cut along different axes"
            continue
        filled = sorted((offset, offset + stop - start) for _, _, start, stop, offset in part.slices)
        for (_, end), (begin, _) in pairwise(filled):
            if begin < end:
                yield f"{place}: its slices overlap at {begin}"
        yield from (f"{place}: {problem}" for problem in _repeated(part))


def _outside(document: PlanDocument, part: RankPart) -> Iterator[str]:
    """Slices of a tensor that is not there, beyond its end, or beyond the end of the parameter."""
    for tensor, dim, start, stop, offset in part.slices:
        shape = document.tensors.get(tensor)
        if shape is None:
            yield f"takes a slice of {tensor}, which is not among the tensors"
        elif not (0 <= dim < len(shape) and len(shape) == len(part.shape)):
            yield f"takes axis {dim} of {tensor} {list(shape)} for a shape of {list(part.shape)}"
        elif not 0 <= start < stop <= shape[dim]:
            yield f"takes [{start}, {stop}) of {tensor}, whose axis {dim} has {shape[dim]}: out of range"
        elif not 0 <= offset <= part.shape[dim] - (stop - start):
            yield f"puts {stop - start} of {tensor} at {offset}, in an axis of {part.shape[dim]}: out of range"
        elif shape[:dim] + shape[dim + 1 :] != part.shape[:dim] + part.shape[dim + 1 :]:
            yield f"its shape {list(part.shape)} and that of {tensor} {list(shape)} differ beside axis {dim}"


def _repeated(part: RankPart) -> Iterator[str]:
    """Parts of a tensor that one rank takes twice."""
    taken = sorted((tensor, start, stop) for tensor, _, start, stop, _ in part.slices)
    for (tensor, _, end), (other, begin, _) in pairwise(taken):
        if tensor == other and begin < end:
            yield f"takes {tensor} twice from {begin}: an overlap"


def _coverage_problems(document: PlanDocument) -> Iterator[str]:
    """Tensors of which no rank takes some part."""
    taken: dict[str, list[tuple[int, int, int]]] = {}
    for entry in document.parameters.values():
        for part in entry.ranks:
            for tensor, dim, start, stop, _ in part.slices:
                taken.setdefault(tensor, []).append((start, stop, dim))
    for tensor, shape in document.tensors.items():
        ranges = sorted(taken.get(tensor, []))
        reached = 0
        for start, stop, _ in ranges:
            if start > reached:
                break
            reached = max(reached, stop)
        size = shape[ranges[0][2]] if ranges else math.prod(shape)
        if reached < size:
            yield f"{tensor}: no rank takes it from {reached}: the plan does not cover it"


def _parts(document: PlanDocument, names: Sequence[str], rank: int) -> list[list[tuple[object, ...]]]:
    return [sorted(document.parameters[name].ranks[rank].slices) for name in names]


def _planned(plan: ShardingPlan, names: set[str]) -> list[list[tuple[object, ...]]]:
    return [sorted(map(tuple, each.slices)) for each in plan.parameters if each.name in names]


def _refuse(name: str, what: str, problems: Sequence[str]) -> NoReturn:
    shown = "\n  - ".join(problems[:_SHOWN])
    more = f"\n  (and {len(problems) - _SHOWN} more)" if len(problems) > _SHOWN else ""
    raise PlanFileError(f"{name}: {what} in {len(problems)} place(s):\n  - {shown}{more}", remedy=REMAKE)
