"""The proof catches kernels that are wrong in ways that a careless author would not see."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import pytest
import torch

from inference_shardformer.compute.activation import ActivationFunction
from inference_shardformer.compute.base import ComputeSpec
from inference_shardformer.compute.linear import LinearShape, LinearWeight
from inference_shardformer.compute.proof import prove
from inference_shardformer.compute.proof_of_fused import prove_sampling
from inference_shardformer.compute.sampling import Draw, SamplingKernel
from inference_shardformer.compute.torch_kernels import (
    PlainWeight,
    TorchActivation,
    TorchLinear,
    TorchNorm,
    TorchSampling,
)
from inference_shardformer.errors import BackendUnavailableError
from inference_shardformer.kernels import reference_sampling

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


@pytest.mark.parametrize("defect", ["no sum", "norm of a part"])
def test_a_norm_that_adds_wrongly_is_caught(defect: str) -> None:
    class WrongSum(TorchNorm):
        def add_rms_norm(
            self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, *, is_offset: bool = False
        ) -> tuple[torch.Tensor, torch.Tensor]:
            normed, total = super().add_rms_norm(x, residual, weight, eps)
            return (normed, residual) if defect == "no sum" else (self.rms_norm(x, weight, eps), total)

    with pytest.raises(BackendUnavailableError, match="norm kernel"):
        prove(TorchLinear(SPEC), WrongSum(SPEC), TorchActivation(SPEC), SPEC)


class Sorting(SamplingKernel):
    """The reference as a kernel, with a defect."""

    name: ClassVar[str] = "sorting"
    defect: ClassVar[str] = ""

    def bind(self) -> Draw:
        return self.draw

    def draw(
        self,
        logits: torch.Tensor,
        *,
        temperatures: Sequence[float],
        top_ks: Sequence[int],
        top_ps: Sequence[float],
        uniforms: Sequence[float],
    ) -> torch.Tensor:
        given = {
            "temperatures": torch.tensor(temperatures),
            "top_ks": torch.tensor(top_ks),
            "top_ps": torch.tensor(top_ps, dtype=torch.float64),
            "uniforms": torch.tensor(uniforms, dtype=torch.float64),
        }
        if self.defect in given:
            given[self.defect] = given[self.defect] * 0 + 1
        if self.defect == "rows":
            given["uniforms"] = given["uniforms"].roll(1)
        return reference_sampling.sample(logits, **given)


def test_a_sampler_that_is_right_passes_and_torch_has_nothing_to_prove() -> None:
    prove_sampling(Sorting(SPEC), SPEC)
    prove_sampling(TorchSampling(SPEC), SPEC)


@pytest.mark.parametrize("defect", ["temperatures", "top_ks", "top_ps", "rows"])
def test_wrong_samplers_are_caught(defect: str) -> None:
    wrong = type("Wrong", (Sorting,), {"defect": defect})(SPEC)
    with pytest.raises(BackendUnavailableError, match="sampling kernel 'sorting' differs"):
        prove_sampling(wrong, SPEC)


@pytest.mark.parametrize("wrong", ["last", "nan", "value"])
def test_what_finds_other_tokens_is_caught(wrong: str) -> None:
    def find(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        known = rows.nan_to_num(nan=-torch.inf if wrong == "nan" else torch.inf)
        best = known.argmax(dim=-1)
        if wrong == "last":
            best = rows.shape[1] - 1 - known.flip(-1).argmax(dim=-1)
        values = rows.gather(-1, best.unsqueeze(-1)).squeeze(-1)
        return (values + 1 if wrong == "value" else values), best

    kernel = type("Finding", (TorchSampling,), {"bind_greatest": lambda self: find})(SPEC)
    with pytest.raises(BackendUnavailableError, match="finds the likeliest tokens"):
        prove_sampling(kernel, SPEC)


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
