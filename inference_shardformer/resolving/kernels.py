"""Selects the compute kernels that a configuration asks for, or says what is wrong with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple, cast

import torch

from inference_shardformer.attention.selector import Selection
from inference_shardformer.attention.slot_writes import is_stored_by_slot
from inference_shardformer.attention.spec import Reason
from inference_shardformer.attention.survey import BACKENDS
from inference_shardformer.compute.base import ComputeKind, ComputeSpec
from inference_shardformer.compute.bound import KernelSelections
from inference_shardformer.compute.linear import Compression, LinearKernel
from inference_shardformer.compute.norm import NormKernel
from inference_shardformer.compute.registry import KERNELS
from inference_shardformer.compute.selection import KernelSurvey, make_kernel_survey, select_kernel
from inference_shardformer.config.loader import MergedConfig
from inference_shardformer.config.model import ModelFacts
from inference_shardformer.config.violations import Violation, show
from inference_shardformer.errors import BackendUnavailableError, PluginError
from inference_shardformer.kernels.cpu.library import native_problem
from inference_shardformer.policies.base import Policy
from inference_shardformer.resolving.resolution import Decided

PATH = "inference.kernels"


class ChosenKernels(NamedTuple):
    """What the kernels must serve, and a selection for every kind."""

    spec: ComputeSpec
    selections: KernelSelections

    def decided(self) -> dict[str, Decided]:
        """The choice for every kind by the path of its setting, with the reason."""
        return {
            f"{PATH}.{kind.value}": Decided(selection.name, "the first candidate without a reason against it")
            for kind, selection in self.selections.items()
        }

    def compression(self) -> Compression:
        """How the linear kernel that was chosen keeps weights, and why."""
        return _linear_class(self).compression(self.spec)


def choose_kernels(
    merged: MergedConfig,
    facts: ModelFacts,
    policy: Policy,
    *,
    device: torch.device,
    dtype: torch.dtype,
    kv_dtype: torch.dtype | None,
    chosen: Mapping[str, str],
    violations: list[Violation],
) -> ChosenKernels:
    """A kernel for every kind; a kind without one is missing, and a violation instead.

    `chosen` names the attention backends and the all-reduce that were chosen before.
    """
    spec = ComputeSpec(
        device=device,
        dtype=dtype,
        hidden_size=facts.hidden_size,
        intermediate_size=facts.intermediate_size,
        activation=facts.activation,
        quantization=merged.inference.weights.quantization,
        compression=merged.inference.weights.compression,
        layer_shape=policy.layer_shape,
        has_experts=policy.has_experts,
        rotary=policy.rotary,
        head_dim=facts.head_dim,
        kv_dtype=kv_dtype,
        chosen=chosen,
        own_writes=_own_writes(chosen),
    )
    missing = native_problem()
    survey = make_kernel_survey(None if missing is None else Reason(*missing), device=device)
    selections: dict[ComputeKind, Selection] = {}
    for kind in ComputeKind:  # in order: later kinds look at what was chosen before
        selection = _select(kind, spec, merged, survey, violations)
        if selection is None:
            continue
        selections[kind] = selection
        spec = replace(spec, chosen={**spec.chosen, kind.value: selection.name})
        if kind is ComputeKind.LINEAR:
            spec = replace(spec, fused_activations=_fused(survey, selection.name))
        if kind is ComputeKind.NORM:
            spec = replace(spec, norm_adds=_adds(survey, selection.name))
    return ChosenKernels(spec, selections)


def linear_kernel(chosen: ChosenKernels) -> LinearKernel:
    """The linear kernel that was chosen, unproven: for asking it what a weight takes."""
    return _linear_class(chosen)(chosen.spec)


def _linear_class(chosen: ChosenKernels) -> type[LinearKernel]:
    return cast("type[LinearKernel]", KERNELS[ComputeKind.LINEAR].get(chosen.selections[ComputeKind.LINEAR].name))


def _fused(survey: KernelSurvey, name: str) -> frozenset[str]:
    """The activations that a linear kernel applies itself."""
    kernels = [each.kernel for each in survey.candidates[ComputeKind.LINEAR] if each.name == name]
    return cast("type[LinearKernel]", kernels[0]).fused_activations if kernels else frozenset()


def _adds(survey: KernelSurvey, name: str) -> bool:
    """Whether a norm kernel adds the residual itself."""
    kernels = [each.kernel for each in survey.candidates[ComputeKind.NORM] if each.name == name]
    return bool(kernels) and cast("type[NormKernel]", kernels[0]).fuses_add


def _own_writes(chosen: Mapping[str, str]) -> tuple[str, ...]:
    """The chosen attention backends whose `write` does more than store by slot."""
    names = [name for name in chosen.get("attention", "").split(" + ") if name]
    return tuple(name for name in names if not is_stored_by_slot(BACKENDS.get(name)))


def _select(
    kind: ComputeKind,
    spec: ComputeSpec,
    merged: MergedConfig,
    survey: KernelSurvey,
    violations: list[Violation],
) -> Selection | None:
    path = f"{PATH}.{kind.value}"
    asked = str(merged.value(path))
    try:
        return select_kernel(kind, spec, asked, survey)
    except (BackendUnavailableError, PluginError) as exc:
        rule = f"possible for this model: {exc.message}"
        violations.append(Violation(path, f"{path} = {show(asked)}", merged.origin(path), rule, exc.remedy, exc))
        return None
