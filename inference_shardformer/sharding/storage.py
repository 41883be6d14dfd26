"""Parameters of a sharded model by name, whatever form their module stores them in."""

from __future__ import annotations

from typing import Protocol, cast, runtime_checkable

import torch
from torch import nn


@runtime_checkable
class StoresTensors(Protocol):
    """A module that keeps a weight in a form of its own (packed, quantised); `leaf` is the unsharded module's name."""

    def allocate_tensor(
        self, leaf: str, shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device, is_zeroed: bool
    ) -> None:
        """Give a parameter memory, once."""

    def write_tensor(self, leaf: str, slab: torch.Tensor, *, row: int = 0, column: int = 0) -> None:
        """Put values at a place, in the shape that the plan gives the parameter."""

    def settle_tensor(self, leaf: str) -> None:
        """Everything is written to a parameter for now; it may be written, and settled, again."""

    def plain_tensor(self, leaf: str) -> torch.Tensor:
        """The values in the shape that the plan gives them."""

    def tie_to(self, owner: nn.Module) -> bool:
        """Use the owner's weight; False if a copy was needed."""


@runtime_checkable
class FollowsWeights(Protocol):
    """A module that binds something to its parameters once they are there."""

    def weights_loaded(self) -> None:
        """Every parameter of the model is at its place, and stays there."""


def allocate_parameter(
    model: nn.Module,
    name: str,
    shape: tuple[int, ...],
    *,
    dtype: torch.dtype,
    device: torch.device,
    is_zeroed: bool,
) -> None:
    """Give a parameter memory; what is not written then is zero with `is_zeroed`."""
    module, leaf = _place(model, name)
    if isinstance(module, StoresTensors):
        module.allocate_tensor(leaf, shape, dtype=dtype, device=device, is_zeroed=is_zeroed)
        return
    make = torch.zeros if is_zeroed else torch.empty
    module.register_parameter(leaf, nn.Parameter(make(shape, dtype=dtype, device=device), requires_grad=False))


def write_parameter(model: nn.Module, name: str, slab: torch.Tensor, *, row: int = 0, column: int = 0) -> None:
    """Put values at a place of a parameter: rows along its first axis, columns along its second."""
    module, leaf = _place(model, name)
    if isinstance(module, StoresTensors):
        module.write_tensor(leaf, slab, row=row, column=column)
        return
    target = module.get_parameter(leaf).detach().narrow(0, row, slab.shape[0])
    (target.narrow(1, column, slab.shape[1]) if slab.dim() > 1 else target).copy_(slab)


def settle_parameter(model: nn.Module, name: str) -> None:
    """Everything is written to a parameter for now."""
    module, leaf = _place(model, name)
    if isinstance(module, StoresTensors):
        module.settle_tensor(leaf)


def set_parameter_value(model: nn.Module, name: str, plain: torch.Tensor) -> None:
    """Exchange the values of a parameter in place; `plain` has the shape that the plan gives it."""
    write_parameter(model, name, plain)
    settle_parameter(model, name)


def parameter_value(model: nn.Module, name: str) -> torch.Tensor:
    """The values of a parameter in the shape that the plan gives it; not to be written to."""
    module, leaf = _place(model, name)
    return module.plain_tensor(leaf) if isinstance(module, StoresTensors) else module.get_parameter(leaf).detach()


def tie_tensor(model: nn.Module, owner: str, name: str) -> bool:
    """Make two parameters one tensor; False if they are stored in different forms, and the second became a copy."""
    (owning, owned_leaf), (module, leaf) = _place(model, owner), _place(model, name)
    if isinstance(module, StoresTensors) and isinstance(owning, StoresTensors):
        return module.tie_to(cast("nn.Module", owning))
    module.register_parameter(leaf, owning.get_parameter(owned_leaf))
    return True


def _place(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf
