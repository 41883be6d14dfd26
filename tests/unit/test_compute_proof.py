"""The proof catches kernels that are wrong in ways that a careless author would not see."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch

from inference_shardformer.compute.activation import ActivationFunction
from inference_shardformer.compute.base import ComputeSpec
from inference_shardformer.compute.linear import LinearShape, LinearWeight
from inference_shardformer.compute.proof import prove
from inference_shardformer.compute.torch_kernels import PlainWeight, TorchActivation, TorchLinear, TorchNorm
from inference_shardformer.errors import BackendUnavailableError

SPEC = ComputeSpec(torch.device("cpu"), torch.float32, 64, 128, activation="silu")


class WrongWeight(PlainWeight):
    defect: ClassVar[str] = ""

    def multiply(
        self, x: torch.Tensor, bias: torch.Tensor | None = None, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        out = super().multiply(x, bias, residual)
        if self.defect == "residual":
            return out if residual is None else out - residual
        if self.defect == "last rows":
            out[:, -1] = 0
        if self.defect == "batch" and len(x) > 8:
            out[8:] = out[:1]
        return out.to(torch.float16) if self.defect == "dtype" else out


@pytest.mark.parametrize("defect", ["residual", "last rows", "batch", "dtype"])
def test_wrong_linears_are_caught(defect: str) -> None:
    class Wrong(WrongWeight):
        pass

    class WrongLinear(TorchLinear):
        def weight(self, shape: LinearShape) -> PlainWeight:
            return Wrong(shape)

    Wrong.defect = defect
    with pytest.raises(BackendUnavailableError, match="linear kernel 'torch' differs"):
        prove(WrongLinear(SPEC), TorchNorm(SPEC), TorchActivation(SPEC), SPEC)


def test_a_norm_without_its_weight_is_caught() -> None:
    class WrongNorm(TorchNorm):
        def rms_norm(
            self, x: torch.Tensor, weight: torch.Tensor, eps: float, *, is_offset: bool = False
        ) -> torch.Tensor:
            return super().rms_norm(x, torch.ones_like(weight), eps)

    with pytest.raises(BackendUnavailableError, match="norm kernel"):
        prove(TorchLinear(SPEC), WrongNorm(SPEC), TorchActivation(SPEC), SPEC)


def test_gate_and_up_exchanged_is_caught() -> None:
    class Exchanged(TorchActivation):
        def project(
            self, x: torch.Tensor, weight: LinearWeight, bias: torch.Tensor | None, act_fn: ActivationFunction
        ) -> torch.Tensor:
            up, gate = weight.multiply(x, bias).chunk(2, dim=-1)
            return act_fn(gate) * up

    with pytest.raises(BackendUnavailableError, match="activation kernel"):
        prove(TorchLinear(SPEC), TorchNorm(SPEC), Exchanged(SPEC), SPEC)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_torch_passes(dtype: torch.dtype) -> None:
    spec = ComputeSpec(torch.device("cpu"), dtype, 64, 128, activation="silu")
    prove(TorchLinear(spec), TorchNorm(spec), TorchActivation(spec), spec)
    weight = TorchLinear(spec).weight(LinearShape(4, 6, dtype))
    first = torch.randn(6, 4).to(dtype)
    weight.adopt(first.clone())
    address = weight.tensors["weight"].data_ptr()
    assert torch.equal(weight.plain(), first)
    weight.write(2 * first)
    assert torch.equal(weight.plain(), 2 * first)
    assert weight.tensors["weight"].data_ptr() == address
