"""Fills the parameters of a sharded model from a source of slices, one parameter at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

import torch
from torch import nn

from inference_shardformer.errors import CheckpointError
from inference_shardformer.sharding.plan import ParameterPlan, ShardingPlan, SourceSlice, TensorInfo

Progress = Callable[[int, int], None]


class WeightSource(Protocol):
    """Where slices come from: a checkpoint on disk, or a model in memory."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """What is there."""

    def chunks(self, part: SourceSlice) -> Iterator[tuple[int, torch.Tensor]]:
        """The slice in pieces along the first axis."""

    def release(self, part: SourceSlice) -> None:
        """The slice's tensor will not be asked for again."""


def load_weights(
    model: nn.Module,
    plan: ShardingPlan,
    source: WeightSource,
    *,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress | None = None,
) -> None:
    """Allocate and fill every parameter of the plan, then tie the shared ones.

    `progress` is called with the bytes done and the bytes in all on this rank.
    """
    uses = Counter(part.tensor for parameter in plan.parameters for part in parameter.slices)
    total, done = plan.num_bytes(dtype.itemsize), 0
    for parameter in plan.parameters:
        tensor = _fill(parameter, source, dtype, device)
        _set_parameter(model, parameter.name, nn.Parameter(tensor, requires_grad=False))
        for part in parameter.slices:
            uses[part.tensor] -= 1
            if not uses[part.tensor]:
                source.release(part)
        done += tensor.nbytes
        if progress is not None:
            progress(done, total)
    for owner, name in plan.shared_parameters:
        _set_parameter(model, name, model.get_parameter(owner))
    _check_complete(model)


def check_names(expected: Mapping[str, TensorInfo], found: Mapping[str, TensorInfo], *, optional: set[str]) -> None:
    """Compare a checkpoint with what the model needs; every missing, unexpected or misshapen tensor is named at once.

    `optional` tensors may be there or not (the tied head, buffers that old checkpoints carry).
    """
    problems = [f"missing {name}" for name in expected if name not in found and name not in optional]
    problems += [f"unexpected {name}" for name in found if name not in expected and name not in optional]
    problems += [
        f"{name} has shape {list(found[name].shape)}, the model needs {list(info.shape)}"
        for name, info in expected.items()
        if name in found and found[name].shape != info.shape
    ]
    if problems:
        shown = "\n  - ".join(problems[:12])
        more = f"\n  (and {len(problems) - 12} more)" if len(problems) > 12 else ""
        raise CheckpointError(
            f"the weights do not fit config.json in {len(problems)} place(s):\n  - {shown}{more}",
            remedy="use the weights that belong to this config.json; nothing was loaded",
        )


def _fill(parameter: ParameterPlan, source: WeightSource, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    filled = sum(part.stop - part.start for part in parameter.slices)
    axis = parameter.slices[0].dim if parameter.slices else 0
    allocate = torch.empty if filled == parameter.shape[axis] else torch.zeros
    target = allocate(parameter.shape, dtype=dtype, device=device)
    for part in parameter.slices:
        place = target.narrow(part.dim, part.offset, part.stop - part.start)
        for row, piece in source.chunks(part):
            place.narrow(0, row, piece.shape[0]).copy_(piece)
    return target


def _set_parameter(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    path, _, leaf = name.rpartition(".")
    model.get_submodule(path).register_parameter(leaf, parameter)


def _check_complete(model: nn.Module) -> None:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    empty = [name for name, tensor in tensors if tensor.is_meta]
    if empty:
        raise CheckpointError(
            f"{len(empty)} tensor(s) of the model were left without a value: {', '.join(empty[:8])}",
            remedy="the policy must plan every parameter and rebuild every buffer",
        )
