"""The contract of expert kernels: they run the experts of a mixture that a router has chosen for each token."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from inference_shardformer.compute.activation import ActivationFunction
from inference_shardformer.compute.base import ComputeKernel, ComputeKind
from inference_shardformer.compute.linear import LinearWeight

Mix = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Tokens `[num_tokens, hidden_size]`, weights and chosen experts `[num_tokens, top_k]`, to this rank's part of the sum
`[num_tokens, hidden_size]`."""


@dataclass(frozen=True)
class ExpertParts:
    """The experts of one layer on this rank, loaded and without biases, and the model's own activation."""

    gate_up: Sequence[LinearWeight]
    down: Sequence[LinearWeight]
    act_fn: ActivationFunction


class ExpertsKernel(ComputeKernel):
    """Runs the experts of a layer, or leaves them to their modules, which ask on the host which of them are met."""

    kind: ClassVar[ComputeKind] = ComputeKind.EXPERTS

    @abstractmethod
    def bind(self, parts: ExpertParts) -> Mix | None:
        """What runs one layer without waiting for the device; `None` leaves it to the modules."""
