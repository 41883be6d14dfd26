"""The parameters of a plan as rows: what is cut how, with equal rows of many layers in one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby, product
from typing import NamedTuple, TypeVar

from inference_shardformer.planning.storage import WeightStorage
from inference_shardformer.sharding.plan import ModulePlan, ParameterPlan, ShardingPlan

K = TypeVar("K")


class ParameterRow(NamedTuple):
    """One parameter on every rank. `note` says what is copied, padded or tied."""

    name: str
    style: str
    shapes: tuple[tuple[int, ...], ...]  # of each rank
    num_bytes: tuple[int, ...]  # of each rank
    note: str


def parameter_rows(
    plans: Sequence[ShardingPlan], tensors: Mapping[str, tuple[int, ...]], storage: WeightStorage
) -> list[ParameterRow]:
    """A row for each parameter and each tied weight; `tensors` are the checkpoint's shapes."""
    rows = []
    for place, module in enumerate(plans[0].modules):
        if module.tied_to is not None:
            copies = tuple(storage.copy_bytes(plan, module) for plan in plans)
            note = f"{'a quantised copy of' if any(copies) else 'is'} {module.tied_to}.weight"
            rows.append(ParameterRow(f"{module.path}.weight", module.style, (), copies if any(copies) else (), note))
        for number, parameter in enumerate(module.parameters):
            modules = [plan.modules[place] for plan in plans]
            ranks = [each.parameters[number] for each in modules]
            rows.append(
                ParameterRow(
                    parameter.name,
                    module.style,
                    tuple(each.shape for each in ranks),
                    tuple(storage.parameter_bytes(*each) for each in zip(plans, modules, ranks, strict=True)),
                    _note(module, ranks, tensors),
                )
            )
    return rows


def compressed(named: Iterable[tuple[str, K]]) -> list[tuple[str, K, int]]:
    """Names with something that belongs to each; those that differ by numbers alone in one: `layers.0-29.mlp`.

    The last value is how many they were.
    """
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, belonging in named:
        pattern = tuple("" if part.isdigit() else part for part in name.split("."))
        groups.setdefault((pattern, belonging), []).append(name)
    return [(name, key[1], count) for key, names in groups.items() for name, count in _merged(names)]  # type: ignore[misc]


def _note(module: ModulePlan, ranks: Sequence[ParameterPlan], tensors: Mapping[str, tuple[int, ...]]) -> str:
    """Copies beyond one of each source tensor, and rows that no slice fills."""
    notes = []
    if len(ranks) > 1:
        if all(each.slices == ranks[0].slices for each in ranks):
            notes.append("whole on every rank")
        else:
            notes += _copies(ranks, tensors)
    for rank, each in enumerate(ranks):
        axis = each.slices[0].dim if each.slices else 0
        padding = each.shape[axis] - sum(part.stop - part.start for part in each.slices)
        if padding:
            notes.append(f"{padding} of padding on rank {rank}")
    return ", ".join(notes)


def _copies(ranks: Sequence[ParameterPlan], tensors: Mapping[str, tuple[int, ...]]) -> list[str]:
    held: dict[str, int] = {}
    for each in ranks:
        for part in each.slices:
            held[part.tensor] = held.get(part.tensor, 0) + part.stop - part.start
    dims = {part.tensor: part.dim for each in ranks for part in each.slices}
    copies = {name: count / tensors[name][dims[name]] for name, count in held.items()}
    return [f"{name.split('.')[-2]} {count:g} times" for name, count in copies.items() if not math.isclose(count, 1)]


def _merged(names: list[str]) -> list[tuple[str, int]]:
    """One name for all, if their numbers are all combinations of some; else each by itself."""
    split = [name.split(".") for name in names]
    places = [place for place, part in enumerate(split[0]) if part.isdigit()]
    numbers = [tuple(int(parts[place]) for place in places) for parts in split]
    columns = [sorted(set(column)) for column in zip(*numbers, strict=True)]
    if sorted(numbers) != sorted(product(*columns)):
        return [(name, 1) for name in names]
    ranges = dict(zip(places, map(as_ranges, columns), strict=True))
    return [(".".join(ranges.get(place, part) for place, part in enumerate(split[0])), len(names))]


def as_ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers in short: `0-3,5`."""
    runs = [[n for _, n in run] for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
