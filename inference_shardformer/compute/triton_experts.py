"""The kernel of experts in Triton."""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import torch

from inference_shardformer.attention.spec import Reason
from inference_shardformer.compute.activation import ActivationFunction
from inference_shardformer.compute.base import ComputeCapabilities, ComputeSpec
from inference_shardformer.compute.experts import ExpertParts, ExpertsKernel, Mix
from inference_shardformer.compute.triton_activation import GELU, SILU
from inference_shardformer.kernels.triton.requirement import TRITON
from inference_shardformer.probing.requirement import Requirement


class TritonExperts(ExpertsKernel):
    """Sorts tokens by expert and multiplies by the weights of those that are met, two launches for all of them."""

    name: ClassVar[str] = "triton"
    contract_version: ClassVar[int] = 1
    capabilities: ClassVar[ComputeCapabilities] = ComputeCapabilities(devices=("cuda",))
    requires: ClassVar[tuple[Requirement, ...]] = (Requirement(**TRITON),)

    def __init__(self, spec: ComputeSpec) -> None:
        from inference_shardformer.kernels.triton import activation, experts  # they import Triton

        super().__init__(spec)
        self._kernels = experts
        fused = {**dict.fromkeys(SILU, activation.silu_and_mul), **dict.fromkeys(GELU, activation.gelu_and_mul)}
        self._gated = fused.get(spec.activation)

    @classmethod
    def extra_reasons(cls, spec: ComputeSpec) -> list[Reason]:
        """A model without experts, and weights in another form than torch's."""
        found = []
        if not spec.has_experts:
            message = "the policy names no mixture of experts"
            found.append(Reason("experts", message, "nothing is wrong: there are no experts to run"))
        linear = spec.chosen.get("linear", "")
        if linear != "torch":
            message = f"it reads weights as torch keeps them, and they are kept by {linear or 'nothing'}"
            found.append(Reason("linear", message, "set inference.kernels.linear=torch"))
        return found

    def bind(self, parts: ExpertParts) -> Mix:
        """The layer by the addresses of its weights."""
        kernels, gated = self._kernels, self._gated or partial(_gated, parts.act_fn)
        gate_up, down = (
            kernels.expert_weights([each.tensors["weight"] for each in group]) for group in (parts.gate_up, parts.down)
        )

        def mix(tokens: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
            rows, places = kernels.sort_by_expert(chosen, len(parts.down))
            inner = gated(kernels.multiply(tokens, gate_up, rows))
            own = rows._replace(rows=torch.arange(len(inner), device=inner.device))
            products = kernels.multiply(inner, down, own)[places].view(*chosen.shape, -1)
            return (products * weights.unsqueeze(-1)).sum(dim=1)

        return mix


def _gated(act_fn: ActivationFunction, gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return act_fn(gate) * up
