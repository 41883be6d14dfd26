"""Native linear layers at every level of the machine, against float64 within bounds from theory."""

from __future__ import annotations

import itertools

import pytest
import torch

from inference_shardformer.kernels import reference
from inference_shardformer.kernels.cpu.linear import Norm, embedding, linear
from inference_shardformer.kernels.cpu.packed_weight import PackedWeight, pack

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NUM_ROWS = (1, 2, 3, 5, 8, 9, 16, 17, 33, 64, 100)
SHAPES = ((64, 64), (50, 33), (34, 577), (130, 320))
GROUPS = (None, 0, 32, 64, 128)  # None: not quantised
UNIT = 2.0**-24

pytestmark = pytest.mark.usefixtures("isa_level")


@pytest.fixture(params=DTYPES)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return DTYPES[request.param]


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def noise(*shape: int, dtype: torch.dtype, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def packed(weight: torch.Tensor, *, segments: int = 1, group: int | None = None) -> PackedWeight:
    if group is None:
        return pack(weight, segments=segments)
    return pack(weight, segments=segments, quantization="int8", group_size=group)


def sum_error(x: torch.Tensor, weight: torch.Tensor, addends: torch.Tensor, *, is_int8: bool) -> torch.Tensor:
    """How far a sum in floats may be from the exact one: a rounding per term, and for int8 half a step of x."""
    wide, magnitude = x.double(), weight.double().abs()
    bound = (x.shape[1] + 8) * UNIT * (wide.abs() @ magnitude.T + addends.abs())
    if is_int8:
        step = wide.abs().amax(dim=1, keepdim=True) / (127 * 128)
        bound = bound + step / 2 * 1.001 * magnitude.sum(dim=1)
    return bound


def assert_within(out: torch.Tensor, exact: torch.Tensor, bound: torch.Tensor) -> None:
    """Besides the bound, one rounding to the type of the result."""
    info = torch.finfo(out.dtype)
    allowed = bound + (exact.abs() + bound) * info.eps / 2 + info.smallest_normal * info.eps
    error = (out.double() - exact).abs()
    assert (error <= allowed).all(), f"error is {(error / allowed).max():.3g} of what is allowed"


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error(dtype, shape, group):
    n, k = shape
    weight, bias = packed(noise(n, k, dtype=dtype), group=group), noise(n, dtype=dtype, seed=1)
    plain = weight.read()
    for m, out_dtype in itertools.product(NUM_ROWS, {dtype, torch.float32}):
        x, residual = noise(m, k, dtype=dtype, seed=m), noise(m, n, dtype=out_dtype, seed=2)
        exact = reference.linear(x.double(), plain.double(), bias=bias.double(), residual=residual.double())
        bound = sum_error(x, plain, bias.double().abs() + residual.double().abs(), is_int8=group is not None)
        assert_within(linear(x, weight, bias=bias, residual=residual, out_dtype=out_dtype), exact, bound)


@pytest.mark.parametrize("group", [None, 0, 64])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gate(dtype, activation, group):
    n, k = 2 * 50, 130
    weight, bias = packed(noise(n, k, dtype=dtype), segments=2, group=group), noise(n, dtype=dtype, seed=1)
    plain = weight.read()
    for m in NUM_ROWS:
        x = noise(m, k, dtype=dtype, seed=m, scale=0.3)
        exact = reference.linear(x.double(), plain.double(), bias=bias.double(), activation=activation)
        gate, up = reference.linear(x.double(), plain.double(), bias=bias.double()).chunk(2, dim=1)
        gate_error, up_error = sum_error(x, plain, bias.double().abs(), is_int8=group is not None).chunk(2, dim=1)
        # Both activations have slopes below 1.13; the exponential and the quotient lose a few units.
        bound = 1.13 * gate_error * (up.abs() + up_error) + gate.abs() * up_error + 2.0**-20 * exact.abs() + 1e-30
        assert_within(linear(x, weight, bias=bias, activation=activation), exact, bound)


@pytest.mark.parametrize("group", [None, 0, 32, 64])
def test_a_row_depends_on_nothing_but_itself(dtype, group, two_threads):
    n, k = 224, 320
    weight = packed(noise(n, k, dtype=dtype), group=group)
    x = noise(100, k, dtype=dtype, seed=1)
    alone = linear(x[:1], weight)
    for m in NUM_ROWS:
        together = linear(x[:m], weight)
        assert torch.equal(together[:1], alone)
        assert torch.equal(linear(x[m - 1 : m], weight), together[-1:])
    torch.set_num_threads(1)
    assert torch.equal(linear(x, weight), together)


def test_norm(dtype):
    weight, scale = pack(noise(40, 100, dtype=dtype)), noise(100, dtype=dtype, seed=1)
    for m in (1, 20):
        x = noise(m, 100, dtype=dtype, seed=2, scale=3.0)
        out = linear(x, weight, norm=Norm(scale, 1e-5, weight_offset=1.0), out_dtype=torch.float32)
        normed = reference.rms_norm(x.double(), scale.double() + 1.0, 1e-5)
        exact = reference.linear(normed, weight.read().double())
        # One rounding of the normalised row to its type, and the floats of the mean.
        bound = (torch.finfo(dtype).eps * 0.51 + 2.0**-20) * (normed.abs() @ weight.read().double().abs().T)
        assert_within(out, exact, bound + 1e-30)
    twice = linear(x, weight, norm=Norm(scale, 1e-5, rounds_before_weight=True), out_dtype=torch.float32)
    rounded = reference.rms_norm(x.float(), torch.ones(100), 1e-5).to(dtype)
    expected = linear((rounded.float() * scale.float()).to(dtype), weight, out_dtype=torch.float32)
    assert (twice - expected).abs().max() <= torch.finfo(dtype).eps * 100


def test_rows_apart_in_place_and_an_output(dtype):
    weight, wide = pack(noise(50, 100, dtype=dtype)), noise(9, 130, dtype=dtype)
    x, residual = wide[:, 10:110], noise(9, 50, dtype=dtype, seed=1)
    expected = linear(x.contiguous(), weight, residual=residual)
    out = torch.full((9, 60), 7.0, dtype=dtype)
    assert torch.equal(linear(x, weight, residual=residual, out=out[:, 5:55]), expected)
    assert (out[:, :5] == 7).all()
    assert (out[:, 55:] == 7).all()
    assert linear(x, weight, residual=residual, out=residual) is residual
    assert torch.equal(residual, expected)


def test_leading_axes_and_no_rows(dtype):
    weight, x = pack(noise(50, 64, dtype=dtype)), noise(2, 3, 64, dtype=dtype)
    assert torch.equal(linear(x, weight), linear(x.view(6, 64), weight).view(2, 3, 50))
    assert linear(x[:0], weight).shape == (0, 3, 50)


@pytest.mark.parametrize("group", [None, 0])
def test_what_is_not_finite_stays_in_its_row(dtype, group):
    weight, x = packed(noise(40, 64, dtype=dtype), group=group), noise(3, 64, dtype=dtype)
    clean = linear(x, weight)
    x[1, 5], x[2, 6] = float("nan"), float("inf")
    out = linear(x, weight)
    assert torch.equal(out[0], clean[0])
    assert out[1].isnan().all()
    assert not out[2].isfinite().any()


def test_int8_rows_of_zeros_and_of_all_sizes():
    weight = packed(noise(40, 64, dtype=torch.float32), group=0)
    x = noise(1, 64, dtype=torch.float32)
    assert (linear(x * 0, weight) == 0).all()
    for scale in (2.0**-80, 2.0**80):
        assert torch.equal(linear(x * scale, weight), linear(x, weight) * scale)


def test_large_batches_and_all_threads(two_threads):
    """Past the rows that stay in the cache while a panel passes."""
    weight = pack(noise(128, 2048, dtype=torch.bfloat16))
    x = noise(600, 2048, dtype=torch.bfloat16, seed=1)
    plain = weight.read()
    exact, bound = x.double() @ plain.double().T, sum_error(x, plain, torch.zeros(()), is_int8=False)
    assert_within(linear(x, weight, out_dtype=torch.float32), exact, bound)


def test_embedding(dtype):
    plain = noise(100, 37, dtype=dtype)
    ids = torch.tensor([[0, 99, 17], [16, 31, 32]])
    weight = pack(plain)
    assert torch.equal(embedding(ids, weight), reference.embedding(ids, plain))
    assert torch.equal(embedding(ids + 90, weight, first=100), reference.embedding(ids + 90, plain, first=100))
    assert embedding(ids[:0], weight).shape == (0, 3, 37)


class TestRefusals:
    def test_x(self):
        weight = pack(noise(8, 16, dtype=torch.bfloat16))
        with pytest.raises(ValueError, match=r"does not fit a weight of torch\.bfloat16"):
            linear(torch.zeros(2, 16), weight)
        with pytest.raises(ValueError, match="does not fit"):
            linear(torch.zeros(2, 15, dtype=torch.bfloat16), weight)
        with pytest.raises(ValueError, match="contiguous"):
            linear(torch.zeros(16, 16, dtype=torch.bfloat16).T, weight)

    def test_others(self):
        weight, x = pack(noise(8, 16, dtype=torch.float32)), torch.zeros(2, 16)
        with pytest.raises(ValueError, match="bias is"):
            linear(x, weight, bias=torch.zeros(9))
        with pytest.raises(ValueError, match="residual is"):
            linear(x, weight, residual=torch.zeros(2, 8, dtype=torch.bfloat16))
        with pytest.raises(ValueError, match="out is"):
            linear(x, weight, out_dtype=torch.bfloat16)
        with pytest.raises(ValueError, match=r"norm\.weight is"):
            linear(x, weight, norm=Norm(torch.zeros(15), 1e-5))

    def test_gates(self):
        x = torch.zeros(2, 16)
        with pytest.raises(ValueError, match="over 1 segments"):
            linear(x, pack(noise(8, 16, dtype=torch.float32)), activation="silu")
        gated = pack(noise(8, 16, dtype=torch.float32), segments=2)
        with pytest.raises(ValueError, match="exclude each other"):
            linear(x, gated, activation="silu", residual=torch.zeros(2, 4))

    def test_embedding(self):
        with pytest.raises(ValueError, match="no embedding"):
            embedding(torch.tensor([0]), packed(noise(8, 16, dtype=torch.float32), group=0))
        with pytest.raises(ValueError, match="give contiguous int64"):
            embedding(torch.tensor([0], dtype=torch.int32), pack(noise(8, 16, dtype=torch.float32)))
