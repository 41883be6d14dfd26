"""Packed weights: every slab and row comes back bit for bit, and int8 equals the twin."""

from __future__ import annotations

import pytest
import torch

from inference_shardformer.kernels import reference
from inference_shardformer.kernels.cpu.packed_weight import WeightArena, empty_weight, pack

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SHAPES = ((64, 64), (50, 33), (34, 577), (2, 1))

pytestmark = pytest.mark.usefixtures("native_library")


@pytest.fixture(params=DTYPES)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return DTYPES[request.param]


def noise(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def bits(t: torch.Tensor) -> torch.Tensor:
    return t.view(torch.int32 if t.dtype == torch.float32 else torch.int16)


@pytest.mark.parametrize("segments", [1, 2])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_round_trip(dtype, shape, segments):
    weight = noise(*shape, dtype=dtype)
    weight[0, 0], weight[-1, -1] = float("nan"), -0.0
    packed = pack(weight, segments=segments)
    assert torch.equal(bits(packed.read()), bits(weight))
    for row in range(0, shape[0], 7):
        assert torch.equal(bits(packed.read(row=row, num_rows=1)), bits(weight[row : row + 1]))


@pytest.mark.parametrize("segments", [1, 2])
def test_slabs(dtype, segments):
    weight = noise(50, 77, dtype=dtype)
    rows, columns = (
        empty_weight(50, 77, dtype=dtype, segments=segments),
        empty_weight(50, 77, dtype=dtype, segments=segments),
    )
    for start in range(0, 50, 13):
        rows.write(weight[start : start + 13], row=start)
    for start in range(0, 77, 9):
        columns.write(weight[:, start : start + 9], column=start)
    assert torch.equal(rows.storage, pack(weight, segments=segments).storage)
    assert torch.equal(columns.storage, rows.storage)


def test_the_layout_is_what_it_is_said_to_be():
    """[panel][k / 2][half][lane][2]: row 35 = panel 1, half 0, lane 3; column 5 = pair 2, second."""
    weight = torch.arange(64 * 32).view(64, 32).to(torch.int16).view(torch.bfloat16)
    panels = pack(weight).storage[: 64 * 32 * 2].view(torch.int16).view(2, 16, 2, 16, 2)
    assert panels[1, 2, 0, 3, 1] == 35 * 32 + 5
    gated = pack(weight, segments=2).storage[: 64 * 32 * 2].view(torch.int16).view(2, 16, 2, 16, 2)
    assert gated[0, 2, 1, 3, 1] == 35 * 32 + 5  # the up row of the same output as gate row 3


@pytest.mark.parametrize("segments", [1, 2])
@pytest.mark.parametrize("shape", [(64, 64), (50, 100)], ids=str)
def test_every_level_packs_alike(native_library, dtype, shape, segments):
    weight = noise(*shape, dtype=dtype)
    best = native_library.isa_level
    found = []
    for level in native_library.isa_levels:
        native_library.set_isa_level(level)
        found.append(pack(weight, segments=segments).storage.clone())
    native_library.set_isa_level(best)
    assert all(torch.equal(storage, found[0]) for storage in found[1:])


@pytest.mark.parametrize("segments", [1, 2])
@pytest.mark.parametrize("group", [0, 4, 32, 64])
def test_int8(dtype, group, segments):
    weight = noise(50, 100, dtype=dtype)
    weight[3] = 0.0
    packed = pack(weight, segments=segments, quantization="int8", group_size=group)
    expected = reference.dequantize_int8(*reference.quantize_int8(weight, group), group)
    assert torch.equal(packed.read(), expected)
    assert torch.equal(packed.read(row=20, num_rows=9, dtype=dtype), expected[20:29].to(dtype))
    largest = weight.double().abs().amax()
    assert (packed.read().double() - weight.double()).abs().max() <= largest / 254 * 1.001


@pytest.mark.parametrize("group", [0, 4])
def test_int8_of_extremes(dtype, group):
    """Rows of zeros, of the least and the greatest numbers that there are, and zeros beside either."""
    least, most = torch.finfo(dtype).smallest_normal / 2, torch.finfo(dtype).max / 2
    weight = torch.tensor([[0.0] * 8, [0.0, least] * 4, [least] * 8, [most, -most] * 4, [most, 0.0] * 4]).to(dtype)
    packed = pack(weight, quantization="int8", group_size=group)
    packed.settle()
    read = packed.read()
    assert torch.equal(read, reference.dequantize_int8(*reference.quantize_int8(weight, group), group))
    assert read.isfinite().all()
    assert (read[weight == 0] == 0).all()
    assert torch.allclose(read, weight.float(), rtol=1 / 127, atol=4e-37)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_int8_of_what_is_not_finite_is_refused_by_its_row(dtype, value):
    weight = noise(50, 33, dtype=dtype)
    weight[37, 32] = value
    packed = pack(weight, quantization="int8", segments=2)
    with pytest.raises(ValueError, match="row 37 of this rank holds a value that is not finite"):
        packed.settle()
    packed.write(noise(1, 33, dtype=dtype), row=37)
    packed.settle()


def test_int8_slabs():
    weight = noise(50, 96, dtype=torch.float32)
    slabs = empty_weight(50, 96, dtype=torch.int8, group_size=32)
    for row, column in ((0, 0), (23, 0), (0, 64), (23, 64)):
        width = 64 if column == 0 else 32
        slabs.write(weight[row : row + (23 if row == 0 else 27), column : column + width], row=row, column=column)
    assert torch.equal(slabs.read(), pack(weight, quantization="int8", group_size=32).read())
    with pytest.raises(ValueError, match="cut a group of 32"):
        slabs.write(weight[:, :40])
    with pytest.raises(ValueError, match="cut a group of 96"):
        empty_weight(50, 96, dtype=torch.int8).write(weight[:, :64])


def test_arena():
    arena = WeightArena()
    weights = [noise(33, 40 + i, dtype=torch.bfloat16, seed=i) for i in range(4)]
    packed = [pack(weight, arena=arena) for weight in weights]
    assert len({each.storage.untyped_storage().data_ptr() for each in packed}) == 1
    assert all(each.storage_pointer % 64 == 0 for each in packed)
    assert all(torch.equal(each.read(), weight) for each, weight in zip(packed, weights, strict=True))
    assert packed[0].num_bytes == packed[0].storage.numel()


class TestRefusals:
    def test_sizes(self):
        with pytest.raises(ValueError, match="segments=2"):
            empty_weight(7, 8, dtype=torch.float32, segments=2)
        with pytest.raises(ValueError, match="group_size=6"):
            empty_weight(8, 8, dtype=torch.int8, group_size=6)
        with pytest.raises(ValueError, match="group_size=4"):
            empty_weight(8, 8, dtype=torch.float32, group_size=4)
        with pytest.raises(ValueError, match="more than int8 can sum"):
            empty_weight(1, (1 << 17) + 1, dtype=torch.int8)
        with pytest.raises(ValueError, match="cannot be packed"):
            empty_weight(8, 8, dtype=torch.float64)
        with pytest.raises(ValueError, match="quantization='int4'"):
            pack(torch.zeros(8, 8), quantization="int4")

    def test_slabs(self):
        packed = empty_weight(8, 8, dtype=torch.float32)
        with pytest.raises(ValueError, match="cannot be packed into"):
            packed.write(torch.zeros(8, 8, dtype=torch.bfloat16))
        with pytest.raises(ValueError, match="does not fit a weight"):
            packed.write(torch.zeros(4, 8), row=5)
        with pytest.raises(ValueError, match="does not fit a weight"):
            packed.read(row=-1, num_rows=2)
        with pytest.raises(ValueError, match="read as it is"):
            packed.read(dtype=torch.bfloat16)
