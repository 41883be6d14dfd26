"""Triton's rounding of rows to e4m3 against its twin, and fp8 products made with it, in Triton's interpreter.

Not collected by its name: `test_triton_interpreted.py` runs it in a process of its own.
"""

# Triton 3.1's interpreter reads the annotations of kernels as they are: no postponing here.

import pytest
import torch
import triton_interpreter
from scaled_mm_standin import scaled_mm

from inference_shardformer.compute.fp8_linear import Fp8Weight
from inference_shardformer.compute.linear import LinearShape
from inference_shardformer.kernels import reference
from inference_shardformer.kernels.scaled_mm import multiply_scaling_rows
from inference_shardformer.kernels.scaled_mm import quantize_rows as by_torch
from inference_shardformer.kernels.triton.fp8_rows import quantize_rows

triton_interpreter.mend_bfloat16()


def noise(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def require_equal(mine: tuple[torch.Tensor, torch.Tensor], twin: tuple[torch.Tensor, torch.Tensor]) -> None:
    for one, other in zip(mine, twin, strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [16, 48, 100, 576])
def test_rows_equal_the_twin_bit_for_bit(size, dtype):
    x = (noise(7, size) * torch.logspace(-4, 4, 7)[:, None]).to(dtype)
    x[3] = 0
    x[5, 2:] = 0
    require_equal(quantize_rows(x, size), reference.quantize_e4m3(x))


@pytest.mark.parametrize("size", [16, 37, 100])
def test_what_is_padded_is_zero(size):
    width = -(-size // 16) * 16
    x = noise(3, size, dtype=torch.bfloat16)
    require_equal(quantize_rows(x, width), by_torch(x, width))
    assert not quantize_rows(x, width)[0][:, size:].float().any()


def test_views_and_nothing():
    wide = noise(5, 64)
    require_equal(quantize_rows(wide[:, 8:32], 32), quantize_rows(wide[:, 8:32].clone(), 32))
    require_equal(quantize_rows(wide[::2], 64), quantize_rows(wide[::2].clone(), 64))
    require_equal(quantize_rows(wide.T, 16), quantize_rows(wide.T.clone(), 16))
    codes, scales = quantize_rows(wide[:0], 64)
    assert (codes.shape, scales.shape) == ((0, 64), (0, 1))


@pytest.mark.filterwarnings("ignore:invalid value")  # NumPy's, of infinity by infinity
def test_a_row_that_is_not_finite_spoils_itself_alone():
    x = noise(4, 32)
    x[1, 3], x[2, 0] = float("nan"), float("inf")
    codes, scales = quantize_rows(x, 32)
    products = reference.dequantize_e4m3(codes, scales).sum(dim=1)
    assert products.isnan().tolist() == [False, True, True, False]


@pytest.mark.parametrize("shape", [(64, 48), (70, 37)], ids=str)
def test_a_weight_multiplies_by_it(shape, monkeypatch):
    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    linear = LinearShape(*shape, torch.bfloat16)
    plain, x = noise(shape[1], shape[0], dtype=torch.bfloat16), noise(5, shape[0], dtype=torch.bfloat16)
    ours, torchs = (Fp8Weight(linear, multiply_scaling_rows, each) for each in (quantize_rows, by_torch))
    for weight in (ours, torchs):
        weight.adopt(plain)
    assert torch.equal(ours.multiply(x), torchs.multiply(x))
