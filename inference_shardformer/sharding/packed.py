"""Styles for checkpoints that keep several projections in one tensor: query, key and value, or gate and up.

A packed tensor cannot be cut at equal distances, since each of its projections is cut by itself. The parameter of a
rank always holds its parts one after the other, whatever the checkpoint's order was, so that one module serves all.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from inference_shardformer.errors import PolicyError
from inference_shardformer.sharding.plan import ParameterPlan, PlanContext, SourceSlice, TensorInfo
from inference_shardformer.sharding.styles import Style, Tensors, module_leaves, rank_heads, source_path


class PackedStyle(Style):
    """One tensor with several projections along its output features; a bias is cut like the weight's rows.

    `sources` names the native sibling that holds it, if it is called differently from the module at the path.
    """

    def plan(self, path: str, tensors: Tensors, context: PlanContext) -> tuple[ParameterPlan, ...]:
        """The row ranges of this rank, one after the other."""
        source = source_path(path, self.sources)
        plans = []
        for leaf, info in module_leaves(source, tensors).items():
            tensor = f"{source}.{leaf}"
            ranges = self.row_ranges(tensor, info.shape[0], context)
            plans.append(_gather(f"{path}.{leaf}", tensor, info, ranges))
        return tuple(plans)

    @abstractmethod
    def row_ranges(self, name: str, size: int, context: PlanContext) -> list[tuple[int, int]]:
        """The rows `[start, stop)` of a tensor with `size` rows that this rank holds, in the order it keeps them."""


@dataclass(frozen=True)
class PackedColumn(PackedStyle):
    """`num_parts` projections of equal size, such as gate and up, each cut evenly."""

    name: ClassVar[str] = "packed_column"
    sources: tuple[str, ...] = ()
    num_parts: int = 2

    def row_ranges(self, name: str, size: int, context: PlanContext) -> list[tuple[int, int]]:
        """This rank's piece of every part."""
        tp_size, tp_rank = context.layout
        part, rest = divmod(size, self.num_parts)
        if rest or part % tp_size:
            raise PolicyError(
                f"{name}: {size} rows are not {self.num_parts} parts that tp_size={tp_size} divides",
                remedy=f"use a tp_size that divides {size // self.num_parts}",
            )
        step = part // tp_size
        return [(i * part + tp_rank * step, i * part + (tp_rank + 1) * step) for i in range(self.num_parts)]


@dataclass(frozen=True)
class PackedQKV(PackedStyle):
    """All query heads, then all key heads, then all value heads; key and value heads are copied when too few."""

    name: ClassVar[str] = "packed_qkv"
    sources: tuple[str, ...] = ()

    def row_ranges(self, name: str, size: int, context: PlanContext) -> list[tuple[int, int]]:
        """This rank's query, key and value heads."""
        facts = context.facts
        totals = (facts.total_num_heads, facts.total_num_kv_heads, facts.total_num_kv_heads)
        _check_heads(name, size, sum(totals), context)
        ranges, before = [], 0
        for total in totals:
            first, count = rank_heads(total, *context.layout)
            ranges.append(((before + first) * facts.head_dim, (before + first + count) * facts.head_dim))
            before += total
        return ranges


@dataclass(frozen=True)
class InterleavedQKV(PackedStyle):
    """The query, key and value of the first head, then those of the second, and so on, as in GPT-NeoX."""

    name: ClassVar[str] = "interleaved_qkv"
    sources: tuple[str, ...] = ()

    def row_ranges(self, name: str, size: int, context: PlanContext) -> list[tuple[int, int]]:
        """This rank's queries, then its keys, then its values."""
        facts = context.facts
        if facts.total_num_kv_heads != facts.total_num_heads:
            raise PolicyError(
                f"{name} holds a key and a value for each of {facts.total_num_heads} heads, but the model has "
                f"{facts.total_num_kv_heads} key/value heads",
                remedy="use packed_qkv(...) for grouped-query attention",
            )
        _check_heads(name, size, 3 * facts.total_num_heads, context)
        first, count = rank_heads(facts.total_num_heads, *context.layout)
        starts = [(3 * head + part) * facts.head_dim for part in range(3) for head in range(first, first + count)]
        return [(start, start + facts.head_dim) for start in starts]


def _check_heads(name: str, size: int, num_heads: int, context: PlanContext) -> None:
    head_dim = context.facts.head_dim
    if size != num_heads * head_dim:
        raise PolicyError(
            f"{name} has {size} rows, but {num_heads} packed heads of head_dim={head_dim} need {num_heads * head_dim}",
            remedy="config.json and the weights disagree: check num_attention_heads, num_key_value_heads, head_dim",
        )


def _gather(name: str, tensor: str, info: TensorInfo, ranges: list[tuple[int, int]]) -> ParameterPlan:
    slices, offset = [], 0
    for start, stop in ranges:
        slices.append(SourceSlice(tensor, 0, start, stop, offset))
        offset += stop - start
    return ParameterPlan(name, (offset, *info.shape[1:]), tuple(slices))
