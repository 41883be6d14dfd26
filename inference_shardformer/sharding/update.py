"""ShardWriter: new values for the weights of one rank, cut from whole tensors under Hugging Face's names."""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Callable, Iterator

import torch
from torch import nn

from inference_shardformer.sharding.plan import ShardingPlan, SourceSlice
from inference_shardformer.sharding.storage import parameter_value, set_parameter_value
from inference_shardformer.sharding.stored import StoredTensor
from inference_shardformer.sharding.unshard import Original


class ShardWriter:
    """Writes whole tensors of the unsharded model into the parameters of this rank, which keep their addresses.

    `note` is told before a value changes.
    """

    def __init__(self, model: nn.Module, plan: ShardingPlan, original: Original, note: Callable[[], None]) -> None:
        self._model = model
        self._note = note
        self._snapshot = original.snapshot
        self._stored: dict[str, list[StoredTensor]] = defaultdict(list)
        for each in original.stored:
            self._stored[each.tensor].append(each)
        self._slices: dict[str, dict[str, list[SourceSlice]]] = defaultdict(lambda: defaultdict(list))
        for parameter in plan.parameters:
            for part in parameter.slices:
                self._slices[part.tensor][parameter.name].append(part)
        self._copies = {owner: name for owner, name in plan.shared_parameters if not _are_one(model, owner, name)}
        tied = {name: owner for owner, name in plan.shared_parameters}
        self._aliases = {**original.snapshot.aliases(self._stored), **tied}

    def canonical(self, name: str) -> str:
        """The name under which a tensor is stored: that of its owner, if it is tied to one."""
        return self._aliases.get(name, name)

    def problem(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> str | None:
        """Why a tensor is none of this model's, or `None`."""
        owner = self.canonical(name)
        if owner not in self._stored:
            near = difflib.get_close_matches(name, self._stored, n=1)
            return f"{name} is no weight of this model" + (f"; did you mean {near[0]}?" if near else "")
        expected = tuple(self._snapshot.shape(owner))
        if shape != expected:
            return f"{name} has shape {list(shape)}, the model's has {list(expected)}"
        if not dtype.is_floating_point:
            return f"{name} has type {str(dtype).removeprefix('torch.')}, which is not a floating-point type"
        return None

    def holds(self, name: str, whole: torch.Tensor) -> bool:
        """Whether this rank's parts have these values already."""
        for parameter, slices, values in self._parts(name, whole):
            held = parameter_value(self._model, parameter)
            for part in slices:
                size = part.stop - part.start
                given = values.narrow(part.dim, part.start, size).to(dtype=held.dtype, device=held.device)
                if not torch.equal(held.narrow(part.dim, part.offset, size), given):
                    return False
        return True

    def store(self, name: str, whole: torch.Tensor) -> None:
        """Write this rank's parts of one tensor, in place. `problem` must have passed it."""
        self._note()
        for parameter, slices, values in self._parts(name, whole):
            self._write(parameter, slices, values)

    def _parts(self, name: str, whole: torch.Tensor) -> Iterator[tuple[str, list[SourceSlice], torch.Tensor]]:
        """The parameters that hold slices of a tensor, and the checkpoint's tensor that these are slices of."""
        for part in self._stored[self.canonical(name)]:
            values = part.view(whole.detach())
            for parameter, slices in self._slices[part.name].items():
                yield parameter, slices, values

    def _write(self, parameter: str, slices: list[SourceSlice], values: torch.Tensor) -> None:
        plain = parameter_value(self._model, parameter).clone()
        for part in slices:
            size = part.stop - part.start
            plain.narrow(part.dim, part.offset, size).copy_(values.narrow(part.dim, part.start, size))
        set_parameter_value(self._model, parameter, plain)
        if parameter in self._copies:
            set_parameter_value(self._model, self._copies[parameter], plain)


def _are_one(model: nn.Module, owner: str, name: str) -> bool:
    """Whether tied parameters are stored once."""
    first, second = (model.get_submodule(each.rpartition(".")[0]) for each in (owner, name))
    return bool({id(each) for each in first.parameters()} & {id(each) for each in second.parameters()})
