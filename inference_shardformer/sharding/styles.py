"""How a module's tensors are cut over ranks. A style plans names and numbers; it never touches a tensor."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from inference_shardformer.errors import PolicyError
from inference_shardformer.sharding.plan import ParameterPlan, PlanContext, RankLayout, SourceSlice, TensorInfo

Tensors = Mapping[str, TensorInfo]


class Style(ABC):
    """One way to cut the tensors of a module. `sources` names the native siblings it is made of, if it is not one."""

    name: ClassVar[str]
    sources: tuple[str, ...] = ()
    tied_to: str | None = None

    @abstractmethod
    def plan(self, path: str, tensors: Tensors, context: PlanContext) -> tuple[ParameterPlan, ...]:
        """Plan the parameters of the module at `path`; `tensors` holds its tensors by full name."""


def module_leaves(path: str, tensors: Tensors) -> dict[str, TensorInfo]:
    """The tensors of one module by their last name: weight, bias."""
    prefix = f"{path}."
    return {name[len(prefix) :]: info for name, info in tensors.items() if name.startswith(prefix)}


def source_path(path: str, sources: tuple[str, ...]) -> str:
    """Where the tensors of a module with at most one source stand."""
    return f"{path.rpartition('.')[0]}.{sources[0]}" if sources else path


def _whole(name: str, info: TensorInfo) -> ParameterPlan:
    return ParameterPlan(name, info.shape, (SourceSlice(name, 0, 0, info.shape[0], 0),))


def _even_part(name: str, size: int, layout: RankLayout) -> tuple[int, int]:
    """This rank's `[start, stop)` of an axis that must divide evenly."""
    part, rest = divmod(size, layout.tp_size)
    if rest:
        raise PolicyError(
            f"{name}: an axis of {size} cannot be cut into tp_size={layout.tp_size} equal parts",
            remedy=f"use a tp_size that divides {size}",
        )
    return layout.tp_rank * part, (layout.tp_rank + 1) * part


@dataclass(frozen=True)
class Replicate(Style):
    """Every rank holds the whole module."""

    name: ClassVar[str] = "replicate"

    def plan(self, path: str, tensors: Tensors, context: PlanContext) -> tuple[ParameterPlan, ...]:
        """Every tensor whole."""
        return tuple(_whole(f"{path}.{leaf}", info) for leaf, info in module_leaves(path, tensors).items())


@dataclass(frozen=True)
class Column(Style):
    """Output features are cut over ranks; several `sources` are fused into one matrix, each cut by itself."""

    name: ClassVar[str] = "column"
    sources: tuple[str, ...] = ()

    def plan(self, path: str, tensors: Tensors, context: PlanContext) -> tuple[ParameterPlan, ...]:
        """The sources' parts, one after the other."""
        paths = [f"{path.rpartition('.')[0]}.{source}" for source in self.sources] or [path]
        parts = {source: module_leaves(source, tensors) for source in paths}
        return tuple(self._fuse(f"{path}.{leaf}", leaf, parts, context) for leaf in _common_leaves(path, parts))

    def _fuse(
        self, name: str, leaf: str, parts: Mapping[str, dict[str, TensorInfo]], context: PlanContext
    ) -> ParameterPlan:
        slices: list[SourceSlice] = []
        offset = 0
        for source, leaves in parts.items():
            tensor = f"{source}.{leaf}"
            start, stop = self._range(tensor, source.rpartition(".")[2], leaves[leaf].shape[0], context)
            slices.append(SourceSlice(tensor, 0, start, stop, offset))
            offset += stop - start
        rest = next(iter(parts.values()))[leaf].shape[1:]
        return ParameterPlan(name, (offset, *rest), tuple(slices))

    def _range(self, tensor: str, source: str, size: int, context: PlanContext) -> tuple[int, int]:
        return _even_part(tensor, size, context.layout)


@dataclass(frozen=True)
class GateUp(Column):
    """Gate and up projection fused, the gate first."""

    name: ClassVar[str] = "gate_up"


@dataclass(frozen=True)
class QKV(Column):
    """Query, key and value projections fused; heads are cut over ranks, and key/value heads copied when too few."""

    name: ClassVar[str] = "qkv"
    sources: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")

    def _range(self, tensor: str, source: str, size: int, context: PlanContext) -> tuple[int, int]:
        facts, (tp_size, tp_rank) = context.facts, context.layout
        total = facts.total_num_heads if source == self.sources[0] else facts.total_num_kv_heads
        if size != total * facts.head_dim:
            raise PolicyError(
                f"{tensor} has {size} rows, but {total} heads of head_dim={facts.head_dim} need "
                f"{total * facts.head_dim}",
                remedy="config.json and the weights disagree: check num_attention_heads, num_key_value_heads, head_dim",
            )
        first, count = rank_heads(total, tp_size, tp_rank)
        return first * facts.head_dim, (first + count) * facts.head_dim


@dataclass(frozen=True)
class RowSplit(Style):
    """Input features are cut over ranks and the partial sums added; a bias is whole on every rank, added once after."""

    name: ClassVar[str] = "row"
    sources: tuple[str, ...] = ()

    def plan(self, path: str, tensors: Tensors, context: PlanContext) -> tuple[ParameterPlan, ...]:
        """Weight columns are cut, a bias is whole."""
        plans: list[ParameterPlan] = []
        source = source_path(path, self.sources)
        for leaf, info in module_leaves(source, tensors).items():
            name, tensor = f"{path}.{leaf}", f"{source}.{leaf}"
            if len(info.shape) == 1:
                plans.append(ParameterPlan(name, info.shape, (SourceSlice(tensor, 0, 0, info.shape[0], 0),)))
                continue
            start, stop = _even_part(tensor, info.shape[1], context.layout)
            plans.append(ParameterPlan(name, (info.shape[0], stop - start), (SourceSlice(tensor, 1, start, stop, 0),)))
        return tuple(plans)


@dataclass(frozen=True)
class PartialRowSplit(RowSplit):
    """As `RowSplit`, of a module that leaves its partial sums to the replaced one above it, which adds them once."""

    name: ClassVar[str] = "partial_row"


@dataclass(frozen=True)
class Vocab(Style):
    """Vocabulary rows are cut over ranks, padded with zeros to equal parts; `tied_to` names the owner of the weight."""

    name: ClassVar[str] = "vocab"
    tied_to: str | None = None

    def plan(self, path: str, tensors: Tensors, context: PlanContext) -> tuple[ParameterPlan, ...]:
        """The rows of this rank's part of the vocabulary. A tied module owns its bias, if it has one, alone."""
        start, stop = vocab_range(context)
        part = padded_vocab_part(context.facts.vocab_size, context.layout.tp_size)
        return tuple(
            ParameterPlan(
                f"{path}.{leaf}",
                (part, *info.shape[1:]),
                (SourceSlice(f"{path}.{leaf}", 0, start, stop, 0),) if stop > start else (),
            )
            for leaf, info in module_leaves(path, tensors).items()
            if self.tied_to is None or leaf != "weight"
        )


def rank_heads(total: int, tp_size: int, tp_rank: int) -> tuple[int, int]:
    """First head and number of heads of a rank; with fewer heads than ranks, neighbouring ranks share a copy."""
    if total >= tp_size:
        return tp_rank * total // tp_size, total // tp_size
    return tp_rank * total // tp_size, 1


def padded_vocab_part(vocab_size: int, tp_size: int) -> int:
    """Vocabulary rows on each rank, padding included."""
    return -(-vocab_size // tp_size)


def vocab_range(context: PlanContext) -> tuple[int, int]:
    """The token ids `[start, stop)` this rank really holds; the rest of its part is padding."""
    part = padded_vocab_part(context.facts.vocab_size, context.layout.tp_size)
    start = min(context.layout.tp_rank * part, context.facts.vocab_size)
    return start, min(start + part, context.facts.vocab_size)


def _common_leaves(path: str, parts: Mapping[str, dict[str, TensorInfo]]) -> list[str]:
    """Leaves that every fused source has; a leaf that only some have cannot be fused."""
    names = {source: sorted(leaves, reverse=True) for source, leaves in parts.items()}
    if len({tuple(leaves) for leaves in names.values()}) > 1:
        raise PolicyError(
            f"{path}: its sources do not hold the same tensors: {names}",
            remedy="use a policy that keeps these projections apart",
        )
    return next(iter(names.values()))
