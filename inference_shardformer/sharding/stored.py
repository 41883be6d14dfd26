"""How a checkpoint keeps the tensors of a model where the two differ: other names, or one tensor in several parts.

Three names are told apart. Files have that of the checkpoint, and so have the slices of a plan. The model has its own.
The rows of a policy meet each part beside the module that uses it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch

from inference_shardformer.errors import PolicyError
from inference_shardformer.sharding.plan import ParameterPlan, ShardingPlan, TensorInfo


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint and the part of a model's tensor that it holds.

    `row` is the name that the policy's rows know it by. `index` picks one along the first axis, which the stored tensor
    lacks; `rows` picks `[start, stop)` along the first axis that is left. Without them it is the whole tensor.
    """

    name: str
    row: str
    tensor: str
    index: int | None = None
    rows: tuple[int, int] | None = None

    def info(self, whole: TensorInfo) -> TensorInfo:
        """Shape and type of the stored tensor."""
        shape = whole.shape if self.index is None else whole.shape[1:]
        if self.rows is not None:
            shape = (self.rows[1] - self.rows[0], *shape[1:])
        return TensorInfo(shape, whole.dtype)

    def view(self, whole: torch.Tensor) -> torch.Tensor:
        """The stored tensor as a view of the model's."""
        part = whole if self.index is None else whole[self.index]
        return part if self.rows is None else part[self.rows[0] : self.rows[1]]


def as_it_is(name: str) -> StoredTensor:
    """A tensor that checkpoint, model and rows call the same."""
    return StoredTensor(name, name, name)


def stored_infos(stored: Iterable[StoredTensor], infos: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """What a checkpoint of a model with these tensors must hold, by the checkpoint's names."""
    return {each.name: each.info(infos[each.tensor]) for each in stored}


def row_infos(stored: Iterable[StoredTensor], infos: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The same by the names that the policy's rows know."""
    return {each.row: each.info(infos[each.tensor]) for each in stored}


def stored_views(stored: Iterable[StoredTensor], tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A model's tensors as its checkpoint would hold them, without a copy."""
    return {each.name: each.view(tensors[each.tensor]) for each in stored if each.tensor in tensors}


def with_stored_names(plan: ShardingPlan, stored: Iterable[StoredTensor]) -> ShardingPlan:
    """The plan with its slices naming the checkpoint's tensors.

    Raises `PolicyError` if two tensors would have one name.
    """
    names: dict[str, str] = {}
    for each in stored:
        if each.row in names or each.name in names.values():
            raise PolicyError(
                f"the stored tensor {each.name} ({each.row} for the rows) is named twice",
                remedy="let the policy's stored() give every part of the model's tensors names of its own",
            )
        names[each.row] = each.name
    if all(row == name for row, name in names.items()):
        return plan
    modules = tuple(
        replace(module, parameters=tuple(_renamed(parameter, names) for parameter in module.parameters))
        for module in plan.modules
    )
    return replace(plan, modules=modules)


def _renamed(parameter: ParameterPlan, names: Mapping[str, str]) -> ParameterPlan:
    return replace(parameter, slices=tuple(part._replace(tensor=names[part.tensor]) for part in parameter.slices))
