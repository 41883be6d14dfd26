"""A bound linear layer gives what `linear` gives, and refuses what does not fit."""

from __future__ import annotations

import pytest
import torch

from inference_shardformer.kernels.cpu.bound_linear import BoundLinear
from inference_shardformer.kernels.cpu.linear import linear
from inference_shardformer.kernels.cpu.packed_weight import pack

pytestmark = pytest.mark.usefixtures("native_library")


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_equals_linear(quantization):
    weight, bias = pack(noise(50, 64), quantization=quantization), noise(50, seed=1)
    bound = BoundLinear(weight, dtype=torch.bfloat16, bias=bias)
    for m in (1, 20):
        x, residual = noise(m, 130)[:, 3:67], noise(m, 50, seed=2)
        assert torch.equal(bound(x), linear(x, weight, bias=bias))
        expected = linear(x, weight, bias=bias, residual=residual)
        assert bound(x, residual) is residual
        assert torch.equal(residual, expected)
        assert torch.equal(bound(x), linear(x, weight, bias=bias))  # the residual is not remembered


def test_gate_and_wide_output():
    weight, x = pack(noise(100, 64), segments=2), noise(3, 64)
    gated = BoundLinear(weight, dtype=torch.bfloat16, activation="silu", out_dtype=torch.float32)
    assert torch.equal(gated(x), linear(x, weight, activation="silu", out_dtype=torch.float32))
    with pytest.raises(ValueError, match="exclude each other"):
        gated(x, torch.zeros(3, 50))


def test_refusals():
    bound = BoundLinear(pack(noise(50, 64)), dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="x is"):
        bound(noise(3, 63))
    with pytest.raises(ValueError, match="x is"):
        bound(torch.zeros(3, 64))
    with pytest.raises(ValueError, match="residual is"):
        bound(noise(3, 64), noise(3, 49))
    with pytest.raises(ValueError, match="does not fit a weight"):
        BoundLinear(pack(noise(50, 64)), dtype=torch.float32)
