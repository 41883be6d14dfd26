"""The sharding plan of one rank as data: which slices of which checkpoint tensors make up each parameter."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from inference_shardformer.config.model import ModelFacts

LEFT_OUT = "(left out)"  # the row of modules that stay as they are on purpose


class TensorInfo(NamedTuple):
    """What a header tells of a tensor without reading it. `dtype` is the safetensors name, such as `BF16`."""

    shape: tuple[int, ...]
    dtype: str


class RankLayout(NamedTuple):
    """This rank's place in its tensor-parallel group."""

    tp_size: int
    tp_rank: int


class PlanContext(NamedTuple):
    """What a style may look at while planning."""

    facts: ModelFacts
    layout: RankLayout


class SourceSlice(NamedTuple):
    """The part `[start, stop)` along `dim` of one checkpoint tensor, placed at `offset` along the same axis."""

    tensor: str
    dim: int
    start: int
    stop: int
    offset: int


@dataclass(frozen=True)
class ParameterPlan:
    """One parameter on this rank: its shape and the slices that fill it. What no slice fills is zero (padding)."""

    name: str
    shape: tuple[int, ...]
    slices: tuple[SourceSlice, ...]

    @property
    def num_elements(self) -> int:
        """Elements of the parameter on this rank, padding included."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class ModulePlan:
    """One module of the sharded model; `row` is the pattern that claimed it, `tied_to` the owner of its weight."""

    path: str
    row: str
    style: str
    parameters: tuple[ParameterPlan, ...]
    tied_to: str | None = None


@dataclass(frozen=True)
class ShardingPlan:
    """Every module of one rank. `replaced` lists `(path, row)` of modules that are exchanged as a whole."""

    facts: ModelFacts
    layout: RankLayout
    modules: tuple[ModulePlan, ...]
    replaced: tuple[tuple[str, str], ...]
    vocab_range: tuple[int, int]

    @property
    def parameters(self) -> tuple[ParameterPlan, ...]:
        """All parameters of this rank, tied ones once."""
        return tuple(parameter for module in self.modules for parameter in module.parameters)

    @property
    def shared_parameters(self) -> tuple[tuple[str, str], ...]:
        """Pairs of parameter names that are one tensor: the owner first."""
        return tuple((f"{m.tied_to}.weight", f"{m.path}.weight") for m in self.modules if m.tied_to)

    def num_bytes(self, element_size: int) -> int:
        """Bytes of this rank's parameters at `element_size` bytes an element."""
        return element_size * sum(parameter.num_elements for parameter in self.parameters)
