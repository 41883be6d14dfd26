"""Turns a policy's table of rows into a plan, checked in both directions."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from inference_shardformer.errors import PolicyError
from inference_shardformer.sharding.plan import LEFT_OUT, ModulePlan, PlanContext, ShardingPlan, TensorInfo
from inference_shardformer.sharding.styles import Replicate, Style, vocab_range


@dataclass(frozen=True)
class StyleRow:
    """Modules whose path matches `pattern` (`*` stands for one segment) are cut in `style`."""

    pattern: str
    style: Style


@dataclass(frozen=True)
class ReplaceRow:
    """Modules whose path matches `pattern` are exchanged as a whole; rows below them plan their parameters."""

    pattern: str


Row = StyleRow | ReplaceRow


def make_plan(
    rows: Sequence[Row],
    *,
    tensors: Mapping[str, TensorInfo],
    module_paths: Iterable[str],
    context: PlanContext,
    left_out: frozenset[str] = frozenset(),
) -> ShardingPlan:
    """Match every row with the model's modules and every tensor with a row.

    Modules at the paths `left_out` stay as they are, with all below them; that needs `tp_size` 1.

    Raises `PolicyError` for a row that matched nothing and a tensor that no row, or more than one, claims.
    """
    paths = sorted(set(module_paths) | {name.rpartition(".")[0] for name in tensors}, key=_natural)
    modules: list[ModulePlan] = []
    replaced: list[tuple[str, str]] = []
    claimed: dict[str, str] = {}
    below = _by_owner(tensors)
    modules += _leave_out(left_out, tensors, claimed, context)
    for row in rows:
        found = _matches(row, paths)
        matches = [path for path in found if not _is_within(path, left_out)]
        if not found:
            raise PolicyError(
                f"the row {row.pattern!r} of the policy matches no module of {context.facts.architecture}",
                remedy="remove the row or correct its pattern; `*` stands for one segment of the path",
            )
        for path in matches:
            if isinstance(row, ReplaceRow):
                replaced.append((path, row.pattern))
            else:
                _claim(row, path, below, claimed)
                parameters = row.style.plan(path, tensors, context)
                modules.append(ModulePlan(path, row.pattern, row.style.name, parameters, row.style.tied_to))
    _check_coverage(tensors, claimed)
    return ShardingPlan(context.facts, context.layout, tuple(modules), tuple(replaced), vocab_range(context))


def _is_within(path: str, left_out: frozenset[str]) -> bool:
    return any(path == owner or path.startswith(f"{owner}.") for owner in left_out)


def _leave_out(
    left_out: frozenset[str], tensors: Mapping[str, TensorInfo], claimed: dict[str, str], context: PlanContext
) -> list[ModulePlan]:
    """Whole modules, with everything below them."""
    if left_out and context.layout.tp_size > 1:
        raise PolicyError(
            f"{len(left_out)} module(s) are left out, {sorted(left_out)[0]} among them, and tp_size is "
            f"{context.layout.tp_size}: a module that stays whole cannot use a cache that is cut over ranks",
            remedy="use tp_size 1, or adapt the class with policy.adapting(...)",
        )
    style = Replicate()
    modules = []
    for path in sorted(left_out, key=_natural):
        modules.append(ModulePlan(path, LEFT_OUT, style.name, style.plan(path, tensors, context)))
        claimed.update({name: LEFT_OUT for name in tensors if name.startswith(f"{path}.")})
    return modules


def _natural(path: str) -> list[tuple[int, int | str]]:
    return [(0, int(part)) if part.isdigit() else (1, part) for part in path.split(".")]


def _matches(row: Row, paths: Sequence[str]) -> list[str]:
    """Module paths a row applies to; a fused row is found by the first of its sources."""
    parent, _, leaf = row.pattern.rpartition(".")
    fused = isinstance(row, StyleRow) and row.style.sources
    pattern = f"{parent}.{row.style.sources[0]}" if isinstance(row, StyleRow) and fused else row.pattern
    regex = re.compile(re.escape(pattern).replace(r"\*", r"[^.]+"))
    found = [path for path in paths if regex.fullmatch(path)]
    return [f"{path.rpartition('.')[0]}.{leaf}" for path in found] if fused else found


def _by_owner(tensors: Iterable[str]) -> dict[str, list[str]]:
    """The tensors below every path that leads to one."""
    below: dict[str, list[str]] = {}
    for name in tensors:
        owner = name.rpartition(".")[0]
        while owner:
            below.setdefault(owner, []).append(name)
            owner = owner.rpartition(".")[0]
    return below


def _claim(row: StyleRow, path: str, below: Mapping[str, Sequence[str]], claimed: dict[str, str]) -> None:
    parent = path.rpartition(".")[0]
    owners = [f"{parent}.{source}" for source in row.style.sources] or [path]
    for name in chain.from_iterable(below.get(owner, ()) for owner in owners):
        if name in claimed:
            raise PolicyError(
                f"the rows {claimed[name]!r} and {row.pattern!r} both claim {name}",
                remedy="make the patterns of the policy exclude each other",
            )
        claimed[name] = row.pattern


def _check_coverage(tensors: Mapping[str, TensorInfo], claimed: Mapping[str, str]) -> None:
    orphans = [name for name in tensors if name not in claimed]
    if orphans:
        raise PolicyError(
            f"no row of the policy covers {len(orphans)} parameter(s): {', '.join(orphans[:8])}",
            remedy="add a row for them (replicate(...) keeps a module whole on every rank)",
        )
