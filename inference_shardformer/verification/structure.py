"""Checks of the plans of all ranks: that together they hold every tensor, once, and tie what the model ties."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from torch import nn

from inference_shardformer.errors import InferenceShardformerError
from inference_shardformer.sharding.plan import ParameterPlan, ShardingPlan, SourceSlice, TensorInfo
from inference_shardformer.sharding.styles import Vocab
from inference_shardformer.verification.report import Finding

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_plans(
    plans: Sequence[ShardingPlan], tensors: Mapping[str, TensorInfo], native: PreTrainedModel
) -> list[Finding]:
    """Everything that is wrong with the plans. `tensors` are those the plans must place, by the names they use."""
    findings = [*_check_use(plans, tensors), *_check_ties(plans[0], native)]
    for rank, plan in enumerate(plans):
        findings += [Finding("structure", module, message, rank) for module, message in _check_vocabulary(plan)]
        for parameter in plan.parameters:
            findings += [
                Finding("structure", owner_of(parameter.name), message, rank)
                for message in _check_parameter(parameter, tensors)
            ]
    return findings


def check_model(model: nn.Module, plan: ShardingPlan, *, rank: int) -> list[Finding]:
    """Every parameter of a sharded model must be planned."""
    planned = {parameter.name for parameter in plan.parameters} | {name for _, name in plan.shared_parameters}
    held = {module.path for module in plan.modules}
    extra = [
        name
        for name, _ in model.named_parameters(remove_duplicate=False)
        if name not in planned and owner_of(name) not in held  # a module may store its weight in a form of its own
    ]
    return [Finding("structure", owner_of(name), f"{name} is in no row of the plan", rank) for name in extra]


def finding_of(exc: InferenceShardformerError, paths: Sequence[str]) -> Finding:
    """An error of the planner, with the module whose path it names."""
    text = f"{exc.message} "
    named = [path for path in paths if path and any(f"{path}{end}" in text for end in (".", " ", ",", ":", "'"))]
    return Finding("structure", max(named, key=len, default=""), exc.message)


def owner_of(name: str) -> str:
    """The module of a parameter."""
    return name.rpartition(".")[0]


def _check_parameter(parameter: ParameterPlan, tensors: Mapping[str, TensorInfo]) -> Iterator[str]:
    """Slices must exist, fit, and not lie on each other."""
    taken: list[tuple[int, int]] = []
    for part in parameter.slices:
        if part.tensor not in tensors:
            yield f"{parameter.name} takes a slice of {part.tensor}, which does not exist"
            continue
        rows = tensors[part.tensor].shape[part.dim]
        begin, end = part.offset, part.offset + part.stop - part.start
        if not 0 <= part.start <= part.stop <= rows:
            yield f"{parameter.name} takes [{part.start}, {part.stop}) of {part.tensor}, which has {rows} along it"
        if end > parameter.shape[part.dim]:
            yield f"{parameter.name} of shape {list(parameter.shape)} has no room for [{begin}, {end})"
        if any(begin < other_end and other_begin < end for other_begin, other_end in taken):
            yield f"{parameter.name} is filled twice at [{begin}, {end})"
        taken.append((begin, end))
        if not _is_related(parameter.name, part):
            yield f"{parameter.name} takes its values from {part.tensor}, which belongs to another layer"


def _check_vocabulary(plan: ShardingPlan) -> Iterator[tuple[str, str]]:
    """A cut vocabulary lies at the start of a rank's rows, and is the range of token ids that the sampler counts on."""
    start, stop = plan.vocab_range
    for module in (module for module in plan.modules if module.style == Vocab.name):
        for parameter in module.parameters:
            held = [(part.start, part.stop, part.offset) for part in parameter.slices]
            if held not in ([(start, stop, 0)], []) or (not held and stop > start):
                yield module.path, f"{parameter.name} must hold the token ids [{start}, {stop}) from its first row on"


def _is_related(name: str, part: SourceSlice) -> bool:
    """A parameter of one layer is filled from tensors of the same layer, whatever a checkpoint calls them."""
    numbers = [[piece for piece in path.split(".") if piece.isdigit()][:1] for path in (name, part.tensor)]
    return numbers[0] == numbers[1]


def _check_use(plans: Sequence[ShardingPlan], tensors: Mapping[str, TensorInfo]) -> Iterator[Finding]:
    """Every element of every tensor must be on a rank, and a rank must use a tensor for one parameter only."""
    for rank, plan in enumerate(plans):
        uses = Counter(tensor for parameter in plan.parameters for tensor in {part.tensor for part in parameter.slices})
        for tensor in (name for name, count in uses.items() if count > 1):
            yield Finding("structure", owner_of(tensor), f"{tensor} is used for {uses[tensor]} parameters", rank)
    held: dict[str, list[SourceSlice]] = {name: [] for name in tensors}
    for plan in plans:
        for part in (part for parameter in plan.parameters for part in parameter.slices):
            held.setdefault(part.tensor, []).append(part)
    for name, parts in held.items():
        if name not in tensors:
            continue
        missing = _gap(parts, tensors[name])
        if missing:
            yield Finding("structure", owner_of(name), f"{missing} of {name} is on no rank")


def _gap(parts: Sequence[SourceSlice], info: TensorInfo) -> str:
    """The first range of a tensor that nobody holds."""
    if not parts:
        return "all"
    size, reached = info.shape[parts[0].dim] if info.shape else 1, 0
    for part in sorted(parts, key=lambda each: each.start):
        if part.start > reached:
            return f"[{reached}, {part.start})"
        reached = max(reached, part.stop)
    return "" if reached >= size else f"[{reached}, {size})"


def _check_ties(plan: ShardingPlan, native: PreTrainedModel) -> Iterator[Finding]:
    """The plan ties what the unsharded model ties, and nothing else."""
    weights = dict(native.named_parameters(remove_duplicate=False))
    planned = {frozenset(pair) for pair in plan.shared_parameters}
    for owner, name in plan.shared_parameters:
        if name in weights and weights.get(owner) is not weights[name]:
            yield Finding(
                "structure", owner_of(name), f"{name} is tied to {owner}, and in the unsharded model it is not"
            )
    names: dict[int, str] = {}
    for name, weight in weights.items():
        owner = names.setdefault(id(weight), name)
        if owner != name and frozenset((owner, name)) not in planned:
            yield Finding("structure", owner_of(name), f"{name} is {owner} in the unsharded model, and here it is not")
