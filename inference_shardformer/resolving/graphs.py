"""Whether decode steps are captured, and up to which batch size; every reason against it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from inference_shardformer.attention.base import Feature, Reason
from inference_shardformer.attention.survey import BACKENDS, BackendRegistry
from inference_shardformer.config.loader import MergedConfig
from inference_shardformer.config.model import ModelFacts
from inference_shardformer.config.violations import Violation, show
from inference_shardformer.policies.base import Policy

PATH = "inference.graphs"
_MOST_BY_ITSELF = 256  # sequences; larger steps keep a device busy without being captured


class ChosenGraphs(NamedTuple):
    """The largest batch size that is captured, 0 for none, and why."""

    largest: int
    reason: str


def choose_graphs(
    merged: MergedConfig,
    facts: ModelFacts,
    policy: Policy,
    *,
    device: torch.device,
    backends: Sequence[str],
    all_reduce: str,
    experts: str = "torch",
    violations: list[Violation],
    registry: BackendRegistry = BACKENDS,
) -> ChosenGraphs:
    """What `inference.graphs` means here; a number that cannot be had is a violation, "auto" without it is none."""
    asked = merged.inference.graphs
    if asked == "none":
        return ChosenGraphs(0, "")
    reasons = graph_reasons(
        facts,
        policy,
        device=device,
        backends=backends,
        all_reduce=all_reduce,
        experts=experts,
        registry=registry,
    )
    if not reasons:
        limit = merged.inference.scheduler.max_num_seqs
        largest = min(limit, _MOST_BY_ITSELF if asked == "auto" else asked)
        return ChosenGraphs(
            largest, f"decode steps of up to {largest} sequences are captured, each size when first met"
        )
    if asked != "auto":
        rule = "a step that can be captured: " + "; ".join(reason.message for reason in reasons)
        remedy = "; ".join(dict.fromkeys(reason.remedy for reason in reasons))
        violations.append(Violation(PATH, f"{PATH} = {show(asked)}", merged.origin(PATH), rule, remedy))
    return ChosenGraphs(0, "; ".join(f"{reason.message} [{reason.code}]" for reason in reasons))


def graph_reasons(
    facts: ModelFacts,
    policy: Policy,
    *,
    device: torch.device,
    backends: Sequence[str],
    all_reduce: str,
    experts: str = "torch",
    registry: BackendRegistry = BACKENDS,
) -> list[Reason]:
    """Why decode steps cannot be captured. Codes: no_graphs, feature_graphs, host_work, all_reduce."""
    if device.type != "cuda":
        return [Reason("no_graphs", f"a device of type {device.type} captures nothing", "set inference.graphs=auto")]
    reasons = [
        Reason(
            "feature_graphs",
            f"attention backend {name} has no plan that can be captured",
            "use another attention.backend, or set inference.graphs=none",
        )
        for name in backends
        if Feature.GRAPHS not in registry.get(name).capabilities.features
    ]
    if not policy.can_capture or (policy.has_experts and experts == "torch"):
        message = f"a step of this {facts.architecture} decides on the host by what the device computed"
        reasons.append(Reason("host_work", message, "set inference.graphs=none"))
    if all_reduce not in ("none", "nccl", "symm_mem"):
        message = f"sums over ranks by {all_reduce} cannot be captured"
        reasons.append(Reason("all_reduce", message, "set shard.all_reduce=auto, or inference.graphs=none"))
    return reasons
