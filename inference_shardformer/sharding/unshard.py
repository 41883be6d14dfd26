"""Unsharding: the parts of all ranks become the Hugging Face model again that was sharded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import nn

from inference_shardformer.errors import StateError
from inference_shardformer.sharding.gather import GatherGroup, Piece, WeightGatherer, can_hold, compute_dtype
from inference_shardformer.sharding.plan import ShardingPlan, TensorInfo
from inference_shardformer.sharding.snapshot import ModelSnapshot
from inference_shardformer.sharding.storage import StoresTensors
from inference_shardformer.sharding.stored import StoredTensor


@dataclass(frozen=True)
class Original:
    """The model before it was sharded: the plans of all ranks, its modules, and the tensors of its checkpoint.

    `tensors` has the shape and the original type of every tensor that the plans cover, by the checkpoint's names;
    `stored` where each lies in the model.
    """

    plans: tuple[ShardingPlan, ...]
    stored: tuple[StoredTensor, ...]
    tensors: Mapping[str, TensorInfo]
    snapshot: ModelSnapshot

    def without(self, paths: frozenset[str]) -> Original:
        """The same without the planned modules at `paths`, whose tensors then belong to somebody else."""
        plans = tuple(
            replace(plan, modules=tuple(module for module in plan.modules if module.path not in paths))
            for plan in self.plans
        )
        kept = {part.tensor for plan in plans for parameter in plan.parameters for part in parameter.slices}
        stored = tuple(each for each in self.stored if each.name in kept)
        tensors = {name: info for name, info in self.tensors.items() if name in kept}
        return Original(plans, stored, tensors, self.snapshot)


def unshard_model(
    model: nn.Module,
    original: Original,
    group: GatherGroup,
    *,
    dtype: torch.dtype,
    everywhere: bool,
    in_memory: bool,
    held: Mapping[str, torch.Tensor] = MappingProxyType({}),
) -> None:
    """Restore the modules, then gather parameter by parameter; a rank lets its parts go as they are gathered.

    `dtype` is the type of the sharded parameters. Unless `everywhere`, only rank 0 gets values, and the parameters of
    the others end on the meta device. `in_memory`: the model had values before it was sharded. `held` are the whole
    tensors that this rank still has of a model that was sharded half way. Raises `CheckpointError`, with the model
    restored from the lower ranks, if copies of one tensor differ.
    """
    parts = _Parts(model, original.plans[group.rank])
    holders = _holders(held, group)
    original.snapshot.restore(is_training=None if in_memory else False)
    gatherer = WeightGatherer(original.plans, group, parts.value)
    keep = everywhere or group.rank == 0
    for name, stored in _by_tensor(original.stored, original.tensors).items():
        whole: torch.Tensor | None = None
        for each in stored:
            info = original.tensors[each.name]
            if each.name in holders:
                values: torch.Tensor | None = _sent(held.get(each.name), info, group, src=holders[each.name])
            else:
                values = gatherer.tensor(each.name, info.shape, dtype=dtype, keep=keep)
            parts.let_go(piece for piece in gatherer.pieces[each.name] if piece.rank == group.rank)
            if keep and values is not None:
                whole = _joined(whole, values, each, original.snapshot.shape(name))
        original.snapshot.assign(name, whole, dtype=compute_dtype(original.tensors[stored[0].name]))
    gatherer.close()


def check_reversible(original_types: Mapping[str, TensorInfo], dtype: torch.dtype, *, is_quantized: bool) -> None:
    """Raise `StateError` where the sharded parameters would not hold what the model holds."""
    lost = [name for name, info in original_types.items() if not can_hold(dtype, compute_dtype(info))]
    if is_quantized:
        raise StateError(
            "quantised weights cannot become the original ones again",
            remedy="leave inference.weights.quantization out, or load the checkpoint again",
        )
    if lost:
        kind = str(compute_dtype(original_types[lost[0]])).removeprefix("torch.")
        raise StateError(
            f"{len(lost)} tensors, {lost[0]} among them, are {kind}, and were computed in "
            f"{str(dtype).removeprefix('torch.')}: their original values are gone",
            remedy="set inference.dtype to the model's own type",
        )


def _holders(held: Mapping[str, torch.Tensor], group: GatherGroup) -> dict[str, int]:
    """The lowest rank that still has a tensor whole, for every tensor that one has."""
    told = group.all_gather_bytes("\n".join(held).encode())
    found: dict[str, int] = {}
    for rank, names in enumerate(told):
        for name in filter(None, names.decode().split("\n")):
            found.setdefault(name, rank)
    return found


def _sent(value: torch.Tensor | None, info: TensorInfo, group: GatherGroup, *, src: int) -> torch.Tensor:
    """A whole tensor of one rank, on all."""
    own = value if group.rank == src else None
    whole = torch.empty(info.shape, dtype=compute_dtype(info), device=group.device)
    if own is not None:
        whole.copy_(own)
    if whole.numel():
        group.broadcast(whole.view(-1).view(torch.uint8), src=src)
    return whole


def _joined(whole: torch.Tensor | None, values: torch.Tensor, each: StoredTensor, shape: torch.Size) -> torch.Tensor:
    """The model's tensor with what one of the checkpoint's holds of it."""
    if each.index is None and each.rows is None:
        return values
    whole = torch.empty(shape, dtype=values.dtype, device=values.device) if whole is None else whole
    each.view(whole).copy_(values)
    return whole


def _by_tensor(stored: Sequence[StoredTensor], tensors: Mapping[str, TensorInfo]) -> dict[str, list[StoredTensor]]:
    """What the checkpoint holds of each of the model's tensors."""
    found: dict[str, list[StoredTensor]] = {}
    for each in stored:
        if each.name in tensors:
            found.setdefault(each.tensor, []).append(each)
    return found


class _Parts:
    """The parameters of this rank, apart from the model that is being restored; each is let go once it was gathered."""

    def __init__(self, model: nn.Module, plan: ShardingPlan) -> None:
        modules = dict(model.named_modules())
        self._uses = Counter(_place(each.name)[0] for each in plan.parameters for _ in each.slices)
        # Modules that stay as they are get other parameter objects when they are restored.
        self._sources: dict[str, StoresTensors | dict[str, nn.Parameter | None]] = {
            path: module if isinstance(module := modules[path], StoresTensors) else dict(module._parameters)
            for path in self._uses
            if path in modules
        }

    def value(self, name: str) -> torch.Tensor:
        """A parameter in the shape of the plan."""
        path, leaf = _place(name)
        source = self._sources[path]
        if isinstance(source, StoresTensors):
            return source.plain_tensor(leaf)
        parameter = source[leaf]
        if parameter is None:
            raise StateError(f"{name} has no value on this rank", remedy="report this")
        return parameter.detach()

    def let_go(self, pieces: Iterable[Piece]) -> None:
        """These slices are not asked for again."""
        for piece in pieces:
            path = _place(piece.parameter)[0]
            self._uses[path] -= 1
            if not self._uses[path]:
                self._sources.pop(path, None)


def _place(name: str) -> tuple[str, str]:
    path, _, leaf = name.rpartition(".")
    return path, leaf
