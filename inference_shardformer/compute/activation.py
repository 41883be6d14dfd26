"""The contract of activation kernels: what stands between the two projections of a gated MLP."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch

from inference_shardformer.compute.base import ComputeKernel, ComputeKind
from inference_shardformer.compute.linear import LinearWeight

ActivationFunction = Callable[[torch.Tensor], torch.Tensor]


class ActivationKernel(ComputeKernel):
    """Applies `act(gate) * up` to the product of a gated projection."""

    kind: ClassVar[ComputeKind] = ComputeKind.ACTIVATION

    @abstractmethod
    def project(
        self, x: torch.Tensor, weight: LinearWeight, bias: torch.Tensor | None, act_fn: ActivationFunction
    ) -> torch.Tensor:
        """`[..., in_features]` to `[..., out_features / 2]` by a gated weight; `act_fn` is the model's own."""
