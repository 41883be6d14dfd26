"""Weights that nobody trains: at every level compressed ones give the bits of plain ones, and int8 its own sums."""

from __future__ import annotations

import pytest
import torch

from inference_shardformer.kernels.cpu.compact_weight import CompactWeight, empty_compact_weight
from inference_shardformer.kernels.cpu.linear import Norm, embedding, linear
from inference_shardformer.kernels.cpu.packed_weight import pack

pytestmark = pytest.mark.usefixtures("isa_level")
SHAPES = ((1, 1), (1, 33), (2, 31), (33, 577), (66, 96))


def _bits_of(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(-(1 << 15), 1 << 15, shape, generator=generator, dtype=torch.int16)


def any_bits(*shape: int) -> torch.Tensor:
    return _bits_of(*shape).view(torch.bfloat16)


def finite(*shape: int) -> torch.Tensor:
    """All exponents up to 2^60."""
    return (_bits_of(*shape) & ~0x4000).view(torch.bfloat16)


def subnormal(*shape: int) -> torch.Tensor:
    return (_bits_of(*shape) & ~0x7F80).view(torch.bfloat16)


def filled(value: float):
    return lambda *shape: torch.full(shape, value, dtype=torch.bfloat16)


def one_of_each(*shape: int) -> torch.Tensor:
    """Usual weights with NaN, infinities, zeros of both signs and a subnormal among them."""
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(2)).bfloat16()
    odd = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-40]).bfloat16()
    count = min(len(odd), weight.numel())
    weight.view(-1)[-count:] = odd[:count]
    return weight


WEIGHTS = {
    "any_bits": any_bits,
    "finite": finite,
    "subnormal": subnormal,
    "one_of_each": one_of_each,
    "zeros": filled(0.0),
    "negative_zeros": filled(-0.0),
    "all_equal": filled(0.375),
    "infinite": filled(float("inf")),
    "nan": filled(float("nan")),
}


def compact(weight: torch.Tensor, *, segments: int = 1) -> CompactWeight:
    packed = empty_compact_weight(*weight.shape, segments=segments, is_filled=True)
    packed.write(weight)
    packed.settle()
    return packed


def bits(t: torch.Tensor) -> torch.Tensor:
    """Its bits, with one NaN for all: which of two NaNs a sum keeps is the compiler's choice."""
    return t.where(t == t, torch.nan).contiguous().view(torch.int16 if t.element_size() == 2 else torch.int32)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("make", WEIGHTS.values(), ids=WEIGHTS)
def test_compressed_weights_are_plain_ones_bit_for_bit(make, shape):
    weight = make(*shape)
    packed, plain = compact(weight), pack(weight)
    assert torch.equal(packed.read().view(torch.int16), weight.view(torch.int16))
    ids = torch.tensor([0, shape[0] - 1, shape[0], -1])  # a head's weight that an embedding is tied to
    assert torch.equal(embedding(ids, packed).view(torch.int16), embedding(ids, plain).view(torch.int16))
    for m in (1, 4, 17, 70):
        x = torch.randn(m, shape[1], generator=torch.Generator().manual_seed(m)).bfloat16()
        norm = Norm(torch.ones(shape[1], dtype=torch.bfloat16), 1e-5) if m == 4 else None
        out_dtype = torch.float32 if m == 17 else None
        mine, its = (linear(x, each, norm=norm, out_dtype=out_dtype) for each in (packed, plain))
        assert torch.equal(bits(mine), bits(its))


@pytest.mark.parametrize("make", WEIGHTS.values(), ids=WEIGHTS)
def test_compressed_gates_are_plain_ones_bit_for_bit(make):
    weight = make(66, 75)
    packed, plain = compact(weight, segments=2), pack(weight, segments=2)
    for m in (1, 20, 70):
        x = torch.randn(m, 75, generator=torch.Generator().manual_seed(m)).bfloat16()
        mine, its = (linear(x, each, activation="silu") for each in (packed, plain))
        assert torch.equal(bits(mine), bits(its))


@pytest.mark.parametrize("m", [1, 5, 40])
@pytest.mark.parametrize("k", [1, 33, 577])
def test_int8_of_extremes_is_exact_in_its_codes(m, k):
    """A channel of zeros, one of subnormals, one of 2^100 and one with a single large weight."""
    weight = torch.randn(37, k, generator=torch.Generator().manual_seed(0))
    weight[0], weight[1], weight[2] = 0.0, 1e-41, 2.0**100
    weight[3, k // 2] = 1e6
    packed = pack(weight, quantization="int8")
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(m))
    x[0] = 0.0
    plain, found = packed.read().double(), linear(x, packed)
    expected = x.double() @ plain.T
    tolerance = x.double().abs().amax(dim=1, keepdim=True) * plain.abs().sum(dim=1) / 32000  # x has 16256 steps
    assert found.isfinite().all()
    assert (found[:, 0] == 0).all()
    assert (found[0] == 0).all()
    assert ((found.double() - expected).abs() <= tolerance + 1e-30).all()
