"""The gather round trip of the weights: every rank's values, put back where the plan says, are the checkpoint's."""

from __future__ import annotations

import torch
from torch import nn

from inference_shardformer.sharding.plan import ParameterPlan, ShardingPlan, SourceSlice
from inference_shardformer.sharding.storage import parameter_value
from inference_shardformer.sharding.weights import WeightSource
from inference_shardformer.verification.report import Finding
from inference_shardformer.verification.structure import owner_of


def check_weights(model: nn.Module, plan: ShardingPlan, source: WeightSource, *, rank: int) -> list[Finding]:
    """Compare every parameter of one rank, bit for bit; what no slice fills must be zero.

    The plans of all ranks cover every tensor, so that ranks whose values all equal their slices reassemble the
    checkpoint, and copies on several ranks equal each other.
    """
    findings = []
    for parameter in plan.parameters:
        got = parameter_value(model, parameter.name)
        message = _difference(parameter, got, source)
        if message:
            findings.append(Finding("weights", owner_of(parameter.name), f"{parameter.name}: {message}", rank))
    for owner, name in plan.shared_parameters:
        if not torch.equal(parameter_value(model, owner), parameter_value(model, name)):
            findings.append(Finding("weights", owner_of(name), f"{name} is not {owner}, which it is tied to", rank))
    return findings


def _difference(parameter: ParameterPlan, got: torch.Tensor, source: WeightSource) -> str:
    """What differs in one parameter; empty if nothing does."""
    if tuple(got.shape) != parameter.shape:
        return f"has shape {list(got.shape)}, the plan says {list(parameter.shape)}"
    is_filled = torch.zeros(parameter.shape, dtype=torch.bool)
    for part in parameter.slices:
        place = got.narrow(part.dim, part.offset, part.stop - part.start)
        is_filled.narrow(part.dim, part.offset, part.stop - part.start).fill_(True)
        if not _equals(place, part, source):
            return f"rows or columns [{part.start}, {part.stop}) of {part.tensor} are not what the checkpoint holds"
    padding = got.cpu()[~is_filled]
    return "" if not padding.any() else "its padding is not zero"


def _equals(place: torch.Tensor, part: SourceSlice, source: WeightSource) -> bool:
    return all(
        torch.equal(place.narrow(0, row, piece.shape[0]).cpu(), piece.to(place.dtype).cpu())
        for row, piece in source.chunks(part)
    )
