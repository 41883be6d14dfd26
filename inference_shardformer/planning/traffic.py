"""Traffic: what the ranks of a plan exchange, for each token, sequence and step."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from inference_shardformer.sharding.plan import ModulePlan, ShardingPlan
from inference_shardformer.sharding.styles import padded_vocab_part

Unit = Literal["token", "sequence", "drawn sequence", "step"]
UNITS: tuple[Unit, ...] = ("token", "sequence", "drawn sequence", "step")
SAMPLER, EVENTS = "(sampler)", "(engine events)"

_SILENT_STYLES = ("replicate", "column", "gate_up", "qkv", "packed_column", "packed_qkv", "interleaved_qkv")
_EVENT_BYTES = 1024  # the message of a step, with or without events of up to that size


class Exchange(NamedTuple):
    """One collective: who calls it, on which type, how often, and the bytes that a rank brings to it each time."""

    module: str
    collective: str
    dtype: str
    unit: Unit
    num_bytes: int


@dataclass(frozen=True)
class Traffic:
    """Every collective of a step. `undeclared` are modules of which the plan cannot tell what they exchange."""

    exchanges: tuple[Exchange, ...]
    undeclared: tuple[str, ...] = ()

    def num_bytes(self, unit: Unit) -> int:
        """Bytes that a rank brings for each token, sequence, drawn sequence or step."""
        return sum(each.num_bytes for each in self.exchanges if each.unit == unit)

    def step_bytes(self, num_tokens: int, num_sequences: int) -> int:
        """Bytes that a rank brings in a step of so many tokens, whose sequences all choose the likeliest token."""
        per_token, per_sequence = self.num_bytes("token"), self.num_bytes("sequence")
        return num_tokens * per_token + num_sequences * per_sequence + self.num_bytes("step")


def plan_traffic(plan: ShardingPlan, dtype: torch.dtype, *, embeddings: Collection[str]) -> Traffic:
    """The traffic of a plan whose activations are of `dtype`; `embeddings` are the paths that look rows up by token.

    A step that brings new requests, aborts or changes sends these too, and the ranks compare digests of them.
    """
    if plan.layout.tp_size == 1:
        return Traffic(())
    replaced = sorted((path for path, _ in plan.replaced), key=len, reverse=True)
    sums: dict[str, int] = {}  # module to the features of a token that it adds up over the ranks
    undeclared = []
    for module in plan.modules:
        reduced = _reduced_features(module, embeddings)
        if reduced is None:
            undeclared.append(module.path)
        elif reduced:
            sums[_adding(module, replaced)] = reduced
    exchanges = [
        Exchange(path, "all_reduce", _name(dtype), "token", reduced * dtype.itemsize) for path, reduced in sums.items()
    ]
    logits = padded_vocab_part(plan.facts.vocab_size, plan.layout.tp_size) * torch.float32.itemsize
    exchanges += [
        Exchange(SAMPLER, "all_gather", "float64", "sequence", 2 * torch.float64.itemsize),  # the best, and where
        Exchange(SAMPLER, "all_gather", "float32", "drawn sequence", logits),
        Exchange(SAMPLER, "broadcast", "int64", "drawn sequence", torch.int64.itemsize),
        Exchange(EVENTS, "broadcast", "uint8", "step", _EVENT_BYTES),
    ]
    return Traffic(tuple(exchanges), tuple(undeclared))


def _reduced_features(module: ModulePlan, embeddings: Collection[str]) -> int | None:
    """Features of a token that the module adds up over the ranks; `None` where its style is not known here."""
    if module.style in _SILENT_STYLES:
        return 0
    weight = next((each for each in module.parameters if each.name == f"{module.path}.weight"), None)
    if module.style == "vocab":
        return weight.shape[1] if weight is not None and module.path in embeddings else 0
    if module.style in ("row", "partial_row") and weight is not None:
        return weight.shape[0]
    return None


def _adding(module: ModulePlan, replaced: Sequence[str]) -> str:
    """Who adds the partial sums of a module: itself, or the replaced module around it, once for all below it."""
    if module.style != "partial_row":
        return module.path
    return next((path for path in replaced if module.path.startswith(f"{path}.")), module.path)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
