"""Check: one rule of the contract and the trials it is tried on; Subject: the backend on trial."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from inference_shardformer.attention.base import AttentionBackend, AttentionCapabilities, AttentionSpec, Reason
from inference_shardformer.conformance.cases import Case
from inference_shardformer.conformance.problem import Problem, make_problem
from inference_shardformer.conformance.verdicts import (
    TOLERANCES,
    ConformanceSkip,
    require,
    require_close,
)

Notes = Mapping[str, object]  # what a trial measured, by name
MakeBackend = Callable[[AttentionSpec], AttentionBackend]
FACT_CODES = ("shape", "head_counts", "dtype", "kv_dtype", "head_dim", "block_size", "gqa_ratio", "device")


@dataclass(frozen=True)
class Subject:
    """A backend class, how its author constructs it, and the device of the trial."""

    backend: type[AttentionBackend]
    make: MakeBackend
    device: torch.device

    @property
    def declared(self) -> AttentionCapabilities:
        """The facts it declares."""
        return self.backend.capabilities

    def build(self, case: Case) -> AttentionBackend:
        """The backend for a case that its facts cover.

        A refusal by a fact is a failure; one by `extra_reasons` skips the trial.
        """
        __tracebackhide__ = True
        reasons = self.backend.reasons(case.spec(self.device))
        require(not broken_facts(reasons), f"it refuses what it declares: {spoken(reasons)}")
        if reasons:
            raise ConformanceSkip(f"refused by its extra_reasons: {spoken(reasons)}")
        return self.make(case.spec(self.device))

    def problem(self, case: Case, *, num_layers: int = 1, poison: float = torch.nan) -> Problem:
        """Fresh tensors for a case, on the device of the trial, in the layout that the backend declares."""
        layout = self.declared.kv_layout
        return make_problem(case, self.device, num_layers=num_layers, poison=poison, layout=layout)

    def require_right(self, case: Case, out: torch.Tensor, problem: Problem, layer_idx: int = 0) -> Notes:
        """Shape, type, device and values of a layer's output; notes the largest difference."""
        __tracebackhide__ = True
        layer = problem.layers[layer_idx]
        require(isinstance(out, torch.Tensor), f"attend returned {type(out).__name__}, not a tensor")
        given = f"{tuple(out.shape)} {out.dtype} on {out.device.type}"
        right = f"{tuple(layer.q.shape)} {layer.q.dtype} on {layer.q.device.type}"
        require(given == right, f"attend returned {given} where the queries are {right}")
        worst = require_close(out, layer.expected, tolerance(case), "attend differs from dense attention")
        return {"worst_difference": worst, "tolerance": tolerance(case)}


class Trial(NamedTuple):
    """One test. `body` returns what it measured, or raises."""

    id: str
    body: Callable[[], Notes | None]


@dataclass(frozen=True)
class Check:
    """One rule, named after what holds if it passes. `trials` reads the facts and does nothing else."""

    name: str
    rule: str
    trials: Callable[[Subject], Iterable[Trial]]
    on_device: bool = True  # False: it is about the class, not about a device


def tolerance(case: Case) -> float:
    """How far a result may be off."""
    return TOLERANCES[case.dtype]


def broken_facts(reasons: Iterable[Reason]) -> list[Reason]:
    """The reasons that come from declared facts, not from a backend's `extra_reasons`."""
    return [reason for reason in reasons if reason.code in FACT_CODES or reason.code.startswith("feature_")]


def spoken(reasons: Iterable[Reason]) -> str:
    """Reasons in one line."""
    return "; ".join(f"{reason.message} [{reason.code}]" for reason in reasons)
