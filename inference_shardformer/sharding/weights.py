"""Fills the parameters of a sharded model from a source of slices, as many at a time as there are threads."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch
from torch import nn

from inference_shardformer.errors import CheckpointError
from inference_shardformer.sharding.checkpoint import ROWS_TOGETHER
from inference_shardformer.sharding.plan import ParameterPlan, ShardingPlan, SourceSlice, TensorInfo
from inference_shardformer.sharding.storage import (
    FollowsWeights,
    allocate_parameter,
    settle_parameter,
    tie_tensor,
    write_parameter,
)

Progress = Callable[[int, int], None]

_TURN_ELEMENTS = 1 << 19  # of a slice that are read before the next has its turn
_NUM_AHEAD = 4  # parameters that the disk may work on while others are stored


class WeightSource(Protocol):
    """Where slices come from: a checkpoint on disk, or a model in memory. Several threads ask for them."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """What is there."""

    def announce(self, part: SourceSlice) -> None:
        """The slice will be asked for soon."""

    def chunks(self, part: SourceSlice) -> Iterator[tuple[int, torch.Tensor]]:
        """The slice in pieces along the first axis; each is valid until the same thread asks for the next."""

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
    for parameter in _filled(model, plan, source, dtype, device):
        for part in parameter.slices:
            uses[part.tensor] -= 1
            if not uses[part.tensor]:
                source.release(part)
        done += parameter.num_elements * dtype.itemsize
        if progress is not None:
            progress(done, total)
    for owner, name in plan.shared_parameters:
        tie_tensor(model, owner, name)
    _check_complete(model)
    for module in model.modules():
        if isinstance(module, FollowsWeights):
            module.weights_loaded()


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


def _filled(
    model: nn.Module, plan: ShardingPlan, source: WeightSource, dtype: torch.dtype, device: torch.device
) -> Iterator[ParameterPlan]:
    """Allocate and fill, in the order of the plan.

    On a CPU each of torch's threads reads and stores a parameter by itself: none waits for another, as those of one
    operation do, and some compute while others read.
    """
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    if threads == 1:
        for parameter in _announced(plan.parameters, source):
            _allocate(model, parameter, dtype, device)
            _fill(model, parameter, source)
            yield parameter
        return
    is_inference = torch.is_inference_mode_enabled()

    def fill(parameter: ParameterPlan) -> ParameterPlan:
        with torch.inference_mode(is_inference):  # each thread has its own
            _fill(model, parameter, source)
        return parameter

    running: deque[Future[ParameterPlan]] = deque()
    try:
        with ThreadPoolExecutor(threads, "weights", initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for parameter in _announced(plan.parameters, source):
                if len(running) == threads:
                    yield running.popleft().result()
                _allocate(model, parameter, dtype, device)
                running.append(pool.submit(fill, parameter))
            while running:
                yield running.popleft().result()
    finally:
        torch.set_num_threads(threads)  # what the others set is the number of threads that begin later, too


def _announced(parameters: Iterable[ParameterPlan], source: WeightSource) -> Iterator[ParameterPlan]:
    """The parameters, of which each is announced when some others are still before it."""
    ahead: deque[ParameterPlan] = deque()
    for parameter in parameters:
        for part in parameter.slices:
            source.announce(part)
        ahead.append(parameter)
        if len(ahead) > _NUM_AHEAD:
            yield ahead.popleft()
    yield from ahead


def _allocate(model: nn.Module, parameter: ParameterPlan, dtype: torch.dtype, device: torch.device) -> None:
    filled = sum(part.stop - part.start for part in parameter.slices)
    axis = parameter.slices[0].dim if parameter.slices else 0
    is_zeroed = filled != parameter.shape[axis]
    allocate_parameter(model, parameter.name, parameter.shape, dtype=dtype, device=device, is_zeroed=is_zeroed)


def _fill(model: nn.Module, parameter: ParameterPlan, source: WeightSource) -> None:
    """Write the slices piece by piece, so that a weight that is stored in another form is never here twice."""
    for part in _in_turns(parameter):
        first_row, column = (part.offset, 0) if part.dim == 0 else (0, part.offset)
        for row, piece in source.chunks(part):
            write_parameter(model, parameter.name, piece, row=first_row + row, column=column)
    try:
        settle_parameter(model, parameter.name)
    except ValueError as exc:
        raise CheckpointError(
            f"{parameter.name}: {exc}", remedy="repair the checkpoint, or leave inference.weights.quantization unset"
        ) from exc


def _in_turns(parameter: ParameterPlan) -> Iterator[SourceSlice]:
    """Some rows of each slice in turn: a weight that keeps gate and up side by side waits for neither for long."""
    slices = parameter.slices
    if len(slices) < 2 or any(part.dim != 0 for part in slices):
        yield from slices
        return
    row_elements = math.prod(parameter.shape[1:])
    step = max(ROWS_TOGETHER, _TURN_ELEMENTS // row_elements // ROWS_TOGETHER * ROWS_TOGETHER)
    for done in range(0, max(part.stop - part.start for part in slices), step):
        for part in slices:
            start, stop = part.start + done, min(part.start + done + step, part.stop)
            if start < stop:
                yield part._replace(start=start, stop=stop, offset=part.offset + done)


def _check_complete(model: nn.Module) -> None:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    empty = [name for name, tensor in tensors if tensor.is_meta]
    if empty:
        raise CheckpointError(
            f"{len(empty)} tensor(s) of the model were left without a value: {', '.join(empty[:8])}",
            remedy="the policy must plan every parameter and rebuild every buffer",
        )
