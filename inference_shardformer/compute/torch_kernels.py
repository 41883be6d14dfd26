"""The kernels that torch brings: they run everywhere, and are what `auto` falls back on."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch.nn import functional

from inference_shardformer.attention.base import AttentionBackend
from inference_shardformer.attention.spec import Reason
from inference_shardformer.compute.activation import ActivationFunction, ActivationKernel
from inference_shardformer.compute.base import ComputeCapabilities, ComputeSpec
from inference_shardformer.compute.decoder_layer import DecoderLayerKernel, LayerParts
from inference_shardformer.compute.experts import ExpertParts, ExpertsKernel
from inference_shardformer.compute.linear import LinearKernel, LinearShape, LinearWeight
from inference_shardformer.compute.norm import NormKernel
from inference_shardformer.compute.rotary_write import RotaryWriteKernel
from inference_shardformer.compute.sampling import SamplingKernel

_EVERYWHERE = ComputeCapabilities(devices=("cpu", "cuda"))


class PlainWeight(LinearWeight):
    """A weight as torch keeps it."""

    def __init__(self, shape: LinearShape) -> None:
        self.shape = shape
        size = (shape.out_features, shape.in_features)
        self._weight = torch.empty(size, dtype=shape.dtype, device="meta")
        self.tensors = {"weight": self._weight}

    def allocate(self, device: torch.device, *, is_zeroed: bool = False) -> None:
        """One tensor `[out_features, in_features]`."""
        make = torch.zeros_like if is_zeroed else torch.empty_like
        self._keep(make(self._weight, device=device))

    def write(self, slab: torch.Tensor, *, row: int = 0, column: int = 0) -> None:
        """Copy."""
        self._weight[row : row + slab.shape[0], column : column + slab.shape[1]].copy_(slab)

    def adopt(self, plain: torch.Tensor) -> None:
        """Keep the tensor."""
        self._keep(plain)

    def plain(self) -> torch.Tensor:
        """The stored tensor itself."""
        return self._weight

    def multiply(
        self, x: torch.Tensor, bias: torch.Tensor | None = None, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        """torch's linear, then the sum."""
        out = functional.linear(x, self._weight, bias)
        return out if residual is None else residual + out

    def multiply_gated(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Torch's linear fuses no activation."""
        raise NotImplementedError("torch's linear fuses no activation; choose an activation kernel that is not fused")

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """torch's embedding."""
        return functional.embedding(ids, self._weight)

    def _keep(self, weight: torch.Tensor) -> None:
        self._weight = weight
        self.tensors = {"weight": weight}


class TorchLinear(LinearKernel):
    """`torch.nn.functional.linear` over plain weights."""

    name: ClassVar[str] = "torch"
    contract_version: ClassVar[int] = 1
    capabilities: ClassVar[ComputeCapabilities] = _EVERYWHERE

    def weight(self, shape: LinearShape) -> PlainWeight:
        """A plain weight."""
        return PlainWeight(shape)

    def num_bytes(self, shape: LinearShape) -> int:
        """Elements times their size."""
        return shape.out_features * shape.in_features * shape.dtype.itemsize


class TorchNorm(NormKernel):
    """Root-mean-square normalisation in a handful of torch operations."""

    name: ClassVar[str] = "torch"
    contract_version: ClassVar[int] = 1
    capabilities: ClassVar[ComputeCapabilities] = _EVERYWHERE

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float, *, is_offset: bool = False) -> torch.Tensor:
        """As Hugging Face writes it."""
        wide = x.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(dim=-1, keepdim=True) + eps)
        if is_offset:
            return (normed * (1.0 + weight.float())).to(x.dtype)
        return weight * normed.to(x.dtype)


class TorchRotaryWrite(RotaryWriteKernel):
    """Queries and keys turned in a handful of torch operations, then the attention backend's own write."""

    name: ClassVar[str] = "torch"
    contract_version: ClassVar[int] = 1
    capabilities: ClassVar[ComputeCapabilities] = _EVERYWHERE

    def bind(self, backend: AttentionBackend) -> None:
        """The modules do it themselves."""
        return


class TorchSampling(SamplingKernel):
    """The engine's own sampler: torch operations over whole rows, which sort them for top-p."""

    name: ClassVar[str] = "torch"
    contract_version: ClassVar[int] = 1
    capabilities: ClassVar[ComputeCapabilities] = _EVERYWHERE

    def bind(self) -> None:
        """The engine draws."""
        return


class TorchExperts(ExpertsKernel):
    """One expert after the other, those that a step meets: the host asks the device which."""

    name: ClassVar[str] = "torch"
    contract_version: ClassVar[int] = 1
    capabilities: ClassVar[ComputeCapabilities] = _EVERYWHERE

    def bind(self, parts: ExpertParts) -> None:
        """The modules of the experts run."""
        return


class ModularLayer(DecoderLayerKernel):
    """Hugging Face's own decoder layer, which calls our modules one by one."""

    name: ClassVar[str] = "modules"
    runs_whole: ClassVar[bool] = False
    contract_version: ClassVar[int] = 1
    capabilities: ClassVar[ComputeCapabilities] = _EVERYWHERE

    def bind(self, parts: LayerParts) -> None:
        """There is nothing to bind."""
        return


class TorchActivation(ActivationKernel):
    """The model's own activation function between two torch operations."""

    name: ClassVar[str] = "torch"
    contract_version: ClassVar[int] = 1
    capabilities: ClassVar[ComputeCapabilities] = _EVERYWHERE

    def project(
        self, x: torch.Tensor, weight: LinearWeight, bias: torch.Tensor | None, act_fn: ActivationFunction
    ) -> torch.Tensor:
        """Multiply, split, activate, multiply."""
        gate, up = weight.multiply(x, bias).chunk(2, dim=-1)
        return act_fn(gate) * up


class FusedActivation(ActivationKernel):
    """The epilogue of the linear kernel; can serve where that kernel fuses the model's activation."""

    name: ClassVar[str] = "fused"
    contract_version: ClassVar[int] = 1
    capabilities: ClassVar[ComputeCapabilities] = _EVERYWHERE

    @classmethod
    def extra_reasons(cls, spec: ComputeSpec) -> list[Reason]:
        """An activation that the linear kernel does not know."""
        if spec.activation in spec.fused_activations:
            return []
        linear, wanted = spec.chosen.get("linear", ""), spec.activation or "(none)"
        message = f"the linear kernel {linear!r} does not fuse the activation {wanted}"
        return [Reason("activation", message, "choose another inference.kernels.linear, or activation kernel")]

    def project(
        self, x: torch.Tensor, weight: LinearWeight, bias: torch.Tensor | None, act_fn: ActivationFunction
    ) -> torch.Tensor:
        """One multiplication with the activation in it."""
        return weight.multiply_gated(x, bias)
