"""Pairwise: few combinations of many values, such that any two values of two axes meet in at least one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations, product
from typing import TypeVar

V = TypeVar("V")


def pairwise(axes: Mapping[str, Sequence[V]]) -> list[dict[str, V]]:
    """Rows over all axes, the same ones each time. A row takes, axis by axis, the value that meets most new pairs."""
    wanted = {
        frozenset({(one, i), (other, j)})
        for one, other in combinations(axes, 2)
        for i, j in product(range(len(axes[one])), range(len(axes[other])))
    }
    rows = []
    while wanted:
        row = _next_row(axes, wanted)
        wanted -= _pairs(row)
        rows.append({axis: axes[axis][index] for axis, index in row.items()})
    return rows


def _next_row(axes: Mapping[str, Sequence[V]], wanted: set[frozenset[tuple[str, int]]]) -> dict[str, int]:
    """Starts with a pair that is still wanted, so every row is of use."""
    order = list(axes)
    first = min(wanted, key=lambda pair: sorted((order.index(axis), index) for axis, index in pair))
    row = dict(first)
    for axis in sorted(set(axes) - set(row), key=lambda axis: (-len(axes[axis]), order.index(axis))):
        gains = [len(_meeting(axis, index, row) & wanted) for index in range(len(axes[axis]))]
        row[axis] = gains.index(max(gains))
    return {axis: row[axis] for axis in order}


def _meeting(axis: str, index: int, row: Mapping[str, int]) -> set[frozenset[tuple[str, int]]]:
    return {frozenset({(axis, index), item}) for item in row.items()}


def _pairs(row: Mapping[str, int]) -> set[frozenset[tuple[str, int]]]:
    return {frozenset(pair) for pair in combinations(row.items(), 2)}
