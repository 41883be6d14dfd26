"""The inverse of a plan: whole tensors of a checkpoint from the parts that the ranks hold, one after another."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch

from inference_shardformer.errors import CheckpointError
from inference_shardformer.sharding.plan import ShardingPlan, SourceSlice, TensorInfo
from inference_shardformer.sharding.safetensors_file import TORCH_DTYPES

_SHOWN = 4


class GatherGroup(Protocol):
    """The collectives that gathering uses."""

    rank: int
    size: int
    device: torch.device

    def broadcast(self, t: torch.Tensor, *, src: int = 0) -> torch.Tensor:
        """Overwrite `t` with that of rank `src`, in place."""

    def all_gather_bytes(self, payload: bytes) -> list[bytes]:
        """Every rank's message, in rank order."""


class Piece(NamedTuple):
    """A slice of a checkpoint's tensor and the parameter of one rank that holds it."""

    rank: int
    parameter: str
    part: SourceSlice


class WeightGatherer:
    """Puts the tensors of a checkpoint together. Every rank makes the same calls; one tensor is held at a time.

    `value` gives a parameter of this rank by its name, in the shape of the plan.
    """

    def __init__(self, plans: Sequence[ShardingPlan], group: GatherGroup, value: Callable[[str], torch.Tensor]) -> None:
        self.pieces = pieces_of(plans)
        self._group = group
        self._value = value
        self._last: tuple[str, torch.Tensor] | None = None
        self._differing: list[str] = []

    def tensor(self, name: str, shape: tuple[int, ...], *, dtype: torch.dtype, keep: bool) -> torch.Tensor | None:
        """The tensor on the device of the group, in the type `dtype` that the parameters have; `None` unless `keep`."""
        whole = torch.empty(shape, dtype=dtype, device=self._group.device) if keep else None
        by_range: dict[tuple[int, int, int], list[Piece]] = defaultdict(list)
        for piece in self.pieces[name]:
            by_range[piece.part.dim, piece.part.start, piece.part.stop].append(piece)
        for (dim, start, stop), copies in by_range.items():
            size = (*shape[:dim], stop - start, *shape[dim + 1 :])
            values = self._sent(copies, size, dtype)
            if whole is not None:
                whole.narrow(dim, start, stop - start).copy_(values)
        return whole

    def close(self) -> None:
        """Raise `CheckpointError`, on every rank, if a part that several ranks hold was not the same on all of them."""
        self._last = None
        told = [answer.decode() for answer in self._group.all_gather_bytes("\n".join(self._differing).encode())]
        found = [f"rank {rank}: {name}" for rank, text in enumerate(told) for name in text.split("\n") if name]
        if found:
            raise CheckpointError(
                f"{len(found)} copies of weights differ from those of a lower rank: {', '.join(found[:_SHOWN])}",
                remedy="the copies of one tensor were changed apart; load or update the weights on all ranks alike",
            )

    def _sent(self, copies: list[Piece], size: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """One part from the first rank that has it; this rank's own copy, if it is another, is compared."""
        own = next((self._slice(piece) for piece in copies if piece.rank == self._group.rank), None)
        source = copies[0].rank
        if source == self._group.rank and own is not None:
            values = own.contiguous()
        else:
            values = torch.empty(size, dtype=dtype, device=self._group.device)
        if values.numel():
            self._group.broadcast(values.view(-1).view(torch.uint8), src=source)
        if own is not None and source != self._group.rank and not _same_bits(own, values):
            self._differing.append(f"{copies[0].part.tensor} in {copies[0].parameter}")
        return values

    def _slice(self, piece: Piece) -> torch.Tensor:
        if self._last is None or self._last[0] != piece.parameter:
            self._last = piece.parameter, self._value(piece.parameter)
        part = piece.part
        return self._last[1].narrow(part.dim, part.offset, part.stop - part.start)


def pieces_of(plans: Sequence[ShardingPlan]) -> dict[str, list[Piece]]:
    """Every piece of every tensor, in rank order; tensors in the order of the parameters that hold them."""
    found: dict[str, list[Piece]] = {}
    for parameters in _side_by_side(plans):
        for rank, slices in parameters.items():
            for name, part in slices:
                found.setdefault(part.tensor, []).append(Piece(rank, name, part))
    return {name: sorted(pieces, key=lambda piece: piece.rank) for name, pieces in found.items()}


def compute_dtype(info: TensorInfo) -> torch.dtype:
    """The type that a header or a tensor in memory names."""
    name = info.dtype.removeprefix("torch.")
    return TORCH_DTYPES[name] if name in TORCH_DTYPES else getattr(torch, name)


def can_hold(wide: torch.dtype, narrow: torch.dtype) -> bool:
    """Whether every value of the type `narrow` is one of `wide`."""
    return torch.promote_types(wide, narrow) == wide


def _same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    raw = first.contiguous().view(-1).view(torch.uint8)
    return torch.equal(raw, second.contiguous().view(-1).view(torch.uint8))


def _side_by_side(
    plans: Sequence[ShardingPlan],
) -> Iterator[Mapping[int, list[tuple[str, SourceSlice]]]]:
    """The slices of every parameter on all ranks, parameter by parameter."""
    names = dict.fromkeys(parameter.name for plan in plans for parameter in plan.parameters)
    by_rank = [{parameter.name: parameter.slices for parameter in plan.parameters} for plan in plans]
    for name in names:
        yield {rank: [(name, part) for part in parameters.get(name, ())] for rank, parameters in enumerate(by_rank)}
