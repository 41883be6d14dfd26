"""The native elementwise kernels at every level of the machine: against the twins, float64, and Hugging Face."""

from __future__ import annotations

import pytest
import torch
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from inference_shardformer.kernels import reference
from inference_shardformer.kernels.cpu import elementwise
from inference_shardformer.kernels.cpu.library import NativeLibrary

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Sizes below, at and beside the widths of vectors, and those of models.
SIZES = (1, 7, 64, 100, 576)
FLOAT_ERROR = 2.0**-20  # of what is computed in floats: a few roundings, sums in several chains

pytestmark = pytest.mark.usefixtures("isa_level")


@pytest.fixture(params=DTYPES)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return DTYPES[request.param]


def noise(*shape: int, dtype: torch.dtype, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def assert_within(actual: torch.Tensor, exact: torch.Tensor, *, roundings: int, floats: float = FLOAT_ERROR) -> None:
    """Each element is off by no more than so many roundings to its type, and the error of floats before them."""
    unit = torch.finfo(actual.dtype).eps / 2
    bound = (roundings * unit * 1.01 + floats) * exact.abs() + torch.finfo(actual.dtype).smallest_normal * unit * 4
    error = (actual.double() - exact).abs()
    assert (error <= bound).all(), f"error {error.max():.3g} where {bound[error > bound].min():.3g} is allowed"


class TestRmsNorm:
    def test_error(self, dtype):
        for size in SIZES:
            x, weight = noise(5, size, dtype=dtype), noise(size, dtype=dtype, seed=1)
            exact = reference.rms_norm(x.double(), weight.double(), 1e-5)
            assert_within(elementwise.rms_norm(x, weight, 1e-5), exact, roundings=1)
            twice = elementwise.rms_norm(x, weight, 1e-5, rounds_before_weight=True)
            assert_within(twice, exact, roundings=2)

    def test_residual(self, dtype):
        x, weight, residual = (
            noise(3, 2, 100, dtype=dtype),
            noise(100, dtype=dtype),
            noise(3, 2, 100, dtype=dtype, seed=2),
        )
        own = residual.clone()
        out = elementwise.rms_norm(x, weight, 1e-5, residual=own)
        assert torch.equal(own, residual + x)
        assert_within(out, reference.rms_norm(own.double(), weight.double(), 1e-5), roundings=1)

    def test_equals_llama(self, dtype):
        """As the same roundings happen, only a sum in another order can tip one, by one unit in the last place."""
        x, norm = noise(64, 576, dtype=dtype, scale=3.0), LlamaRMSNorm(576, eps=1e-5).to(dtype)
        norm.weight.data = noise(576, dtype=dtype, seed=1)
        out, expected = elementwise.rms_norm(x, norm.weight.data, 1e-5, rounds_before_weight=True), norm(x).detach()
        if dtype == torch.float32:
            assert_within(out, expected.double(), roundings=4)
            return
        assert (out != expected).sum() <= 64 * 576 // 500
        assert_within(out, expected.double(), roundings=4)

    def test_equals_gemma(self, dtype):
        x, norm = noise(16, 100, dtype=dtype), GemmaRMSNorm(100, eps=1e-6).to(dtype)
        norm.weight.data = noise(100, dtype=dtype, seed=1, scale=0.1)
        out = elementwise.rms_norm(x, norm.weight.data, 1e-6, weight_offset=1.0)
        assert_within(out, norm(x).detach().double(), roundings=2)

    def test_rows_apart_and_an_output(self, dtype):
        wide, out = noise(4, 130, dtype=dtype), torch.empty(4, 100, dtype=dtype)
        weight = noise(100, dtype=dtype, seed=1)
        assert elementwise.rms_norm(wide[:, 10:110], weight, 1e-5, out=out) is out
        assert torch.equal(out, elementwise.rms_norm(wide[:, 10:110].contiguous(), weight, 1e-5))

    def test_nothing(self, dtype):
        assert elementwise.rms_norm(torch.empty(0, 8, dtype=dtype), torch.ones(8, dtype=dtype), 1e-5).shape == (0, 8)

    def test_zeros_and_nan(self, dtype):
        x = torch.zeros(2, 40, dtype=dtype)
        x[1, 3] = float("nan")
        out = elementwise.rms_norm(x, torch.ones(40, dtype=dtype), 1e-5)
        assert out[0].eq(0).all()
        assert out[1].isnan().all()


class TestLayerNorm:
    @pytest.mark.parametrize("size", [7, 64, 100])
    @pytest.mark.parametrize("parts", ["weight and bias", "weight", "none"])
    def test_error(self, dtype, size, parts):
        x = noise(5, size, dtype=dtype) + 2
        weight = noise(size, dtype=dtype, seed=1) if "weight" in parts else None
        bias = noise(size, dtype=dtype, seed=2) if "bias" in parts else None
        out = elementwise.layer_norm(x, weight, bias, 1e-5)
        wide = [None if each is None else each.double() for each in (weight, bias)]
        exact = reference.layer_norm(x.double(), *wide, 1e-5)
        # Where the bias cancels the product, the error is that of the product: 8 is above every value here.
        unit = torch.finfo(dtype).eps / 2
        assert ((out.double() - exact).abs() <= unit * exact.abs() * 1.01 + 8 * 2.0**-20).all()
        torch.testing.assert_close(
            out, torch.nn.functional.layer_norm(x, (size,), weight, bias, 1e-5), rtol=0.02, atol=0.02
        )

    def test_residual(self, dtype):
        x, residual = noise(3, 100, dtype=dtype), noise(3, 100, dtype=dtype, seed=2)
        own = residual.clone()
        out = elementwise.layer_norm(x, None, None, 1e-5, residual=own)
        assert torch.equal(own, residual + x)
        assert torch.equal(out, elementwise.layer_norm(own, None, None, 1e-5))


class TestGated:
    @pytest.mark.parametrize("name", ["silu_and_mul", "gelu_and_mul"])
    def test_error(self, dtype, name):
        for size in (1, 7, 64, 1536):
            gate_up = noise(3, 2 * size, dtype=dtype, scale=4.0)
            gate, up = gate_up.double().chunk(2, dim=-1)
            exact = getattr(reference, name)(gate_up.double())
            out = getattr(elementwise, name)(gate_up)
            # e^z is off by a relative error that grows with |z|; the twin itself loses 1 + tanh(z) near -1
            z = gate if name == "silu_and_mul" else 1.6 * (gate + 0.045 * gate**3)
            relative = torch.finfo(dtype).eps / 2 * 1.01 + 2.0**-22 * (2 + z.abs())
            smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
            assert ((out.double() - exact).abs() <= relative * exact.abs() + 1e-15 * (gate * up).abs() + smallest).all()

    def test_extremes(self, dtype):
        gates = torch.tensor([-300.0, -88.0, -1e-6, 0.0, 1e-6, 88.0, 300.0, float("nan")]).to(dtype)
        out = elementwise.silu_and_mul(torch.cat((gates, torch.ones(8, dtype=dtype)))[None])[0]
        torch.testing.assert_close(out, torch.nn.functional.silu(gates), rtol=0.01, atol=1e-30, equal_nan=True)
        positive = torch.tensor([20.0, 300.0]).to(dtype)
        assert torch.equal(
            elementwise.gelu_and_mul(torch.cat((positive, torch.ones(2, dtype=dtype)))[None])[0], positive
        )

    def test_rows_apart(self, dtype):
        wide = noise(4, 100, dtype=dtype)
        assert torch.equal(
            elementwise.silu_and_mul(wide[:, 10:74]), elementwise.silu_and_mul(wide[:, 10:74].contiguous())
        )


def test_add(dtype):
    for size in SIZES:
        a, b = noise(3, size, dtype=dtype), noise(3, size, dtype=dtype, seed=1)
        expected = a + b
        assert torch.equal(reference.add(a, b), expected)
        assert torch.equal(elementwise.add(a, b), expected)
        assert elementwise.add(a, b, out=a) is a
        assert torch.equal(a, expected)


def test_every_rounding_is_that_of_torch(dtype):
    """All bit patterns of 16 bits, and floats that lie between two of them."""
    if dtype == torch.float32:
        pytest.skip("nothing is rounded")
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    out = elementwise.add(every, torch.zeros_like(every))
    torch.testing.assert_close(out, every, rtol=0, atol=0, equal_nan=True)
    other = every.flip(0).roll(77)
    torch.testing.assert_close(elementwise.add(every, other), every + other, rtol=0, atol=0, equal_nan=True)


def test_threads_do_not_change_a_result(dtype):
    x, weight = noise(64, 576, dtype=dtype), noise(576, dtype=dtype, seed=1)
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            found.append((elementwise.rms_norm(x, weight, 1e-5), elementwise.silu_and_mul(x), elementwise.add(x, x)))
        finally:
            torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


class TestRefusals:
    @pytest.mark.parametrize(
        ("call", "said"),
        [
            (lambda x: elementwise.rms_norm(x.double(), x[0].double(), 1e-5), "x is torch.float64"),
            (lambda x: elementwise.rms_norm(x.to("meta"), x[0], 1e-5), "on meta"),
            (lambda x: elementwise.rms_norm(x, x[0, :4], 1e-5), "weight"),
            (lambda x: elementwise.rms_norm(x, x[0].half(), 1e-5), "weight is torch.float16"),
            (lambda x: elementwise.rms_norm(x, x[0], 1e-5, residual=x.T), "residual"),
            (lambda x: elementwise.rms_norm(x.T, x[0], 1e-5), "call contiguous"),
            (lambda x: elementwise.rms_norm(x, x[0], 1e-5, out=x[:2]), "out is"),
            (lambda x: elementwise.layer_norm(x, None, x[0, :4], 1e-5), "bias"),
            (lambda x: elementwise.silu_and_mul(x[:, :7]), "7 columns"),
            (lambda x: elementwise.add(x, x[:2]), "b is"),
            (lambda x: elementwise.add(x.T, x.T), "a is"),
        ],
    )
    def test_is_named(self, call, said, native_library: NativeLibrary):
        with pytest.raises(ValueError, match=said):
            call(torch.ones(8, 8))
