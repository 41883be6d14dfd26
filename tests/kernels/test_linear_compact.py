"""Weights in 12 bits: bit for bit what was written, and products bit for bit those of plain packed weights."""

from __future__ import annotations

import ctypes

import pytest
import torch

from inference_shardformer.kernels.cpu import compact_weight
from inference_shardformer.kernels.cpu.compact_weight import CompactWeight, empty_compact_weight, num_compact_bytes
from inference_shardformer.kernels.cpu.linear import Norm, embedding, linear
from inference_shardformer.kernels.cpu.packed_weight import WeightArena, pack

SHAPES = ((64, 64), (50, 33), (34, 577), (130, 320))
NUM_ROWS = (1, 3, 16, 17, 33, 70)
# (m, n, k): see src/linear_blocking.h
CUTS = {
    "one_slice": (40, 96, 576),
    "slices_of_a_panel": (70, 50, 1300),
    "groups_of_panels": (100, 544, 5632),
    "rows_kept": (257, 1120, 96),
    "groups_of_rows_kept": (257, 2200, 576),
    "slices_of_rows": (290, 300, 2080),
}

pytestmark = pytest.mark.usefixtures("isa_level")


def usual(*shape: int, seed: int = 0) -> torch.Tensor:
    """Normally distributed, with a few that are not: they are exceptions in any table of exponents."""
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).mul_(0.02).bfloat16()
    values[0, 0], values[-1, -1], values[1, 2] = 3e30, -1e-30, -0.0
    return values


def any_bits(*shape: int) -> torch.Tensor:
    """All exponents, infinities and NaN among them: nearly every weight is an exception."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(-(1 << 15), 1 << 15, shape, generator=generator, dtype=torch.int16).view(torch.bfloat16)


WEIGHTS = {"usual": usual, "any_bits": any_bits, "zeros": lambda *shape: torch.zeros(*shape, dtype=torch.bfloat16)}


def compact(weight: torch.Tensor, *, segments: int = 1) -> CompactWeight:
    packed = empty_compact_weight(*weight.shape, segments=segments)
    packed.write(weight)
    packed.settle()
    return packed


def bits(t: torch.Tensor) -> torch.Tensor:
    return t.view(torch.int16)


@pytest.mark.parametrize("segments", [1, 2])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("make", WEIGHTS.values(), ids=WEIGHTS)
def test_round_trip(make, shape, segments):
    weight = make(*shape)
    packed = compact(weight, segments=segments)
    assert torch.equal(bits(packed.read()), bits(weight))
    assert torch.equal(bits(packed.read(row=5, num_rows=9)), bits(weight[5:14]))


@pytest.mark.parametrize("m", NUM_ROWS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_are_those_of_plain_weights(shape, m):
    weight, x = usual(*shape), torch.randn(m, shape[1], generator=torch.Generator().manual_seed(m)).bfloat16()
    assert torch.equal(linear(x, compact(weight)), linear(x, pack(weight)))
    residual = torch.ones(m, shape[0])
    mine, plain = (
        linear(x, each, residual=residual, out_dtype=torch.float32) for each in (compact(weight), pack(weight))
    )
    assert torch.equal(mine, plain)


@pytest.mark.parametrize("segments", [1, 2])
@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
def test_many_rows(cut, segments):
    m, n, k = cut
    weight, x = usual(n, k), torch.randn(m, k, generator=torch.Generator().manual_seed(m)).bfloat16()
    norm, activation = Norm(torch.ones(k, dtype=torch.bfloat16), 1e-5), "silu" if segments == 2 else None
    mine, plain = compact(weight, segments=segments), pack(weight, segments=segments)
    assert torch.equal(
        linear(x, mine, norm=norm, activation=activation), linear(x, plain, norm=norm, activation=activation)
    )


def test_products_with_nearly_no_weight_in_the_table():
    finite = any_bits(130, 320).nan_to_num(0.0, 0.0, 0.0).clamp(-1e3, 1e3)
    packed = compact(finite)
    assert packed.num_bytes > finite.numel() * 2  # most are in lists
    for m in (1, 20, 70):
        x = torch.randn(m, 320, generator=torch.Generator().manual_seed(m)).bfloat16()
        assert torch.equal(linear(x, packed), linear(x, pack(finite)))


@pytest.mark.parametrize("make", WEIGHTS.values(), ids=WEIGHTS)
def test_rows_by_token_id(make):
    weight = make(130, 321)
    ids = torch.tensor([[0, 129, 64], [31, 32, 1]])
    assert torch.equal(bits(embedding(ids, compact(weight))), bits(weight[ids]))
    assert torch.equal(embedding(torch.tensor([5, 200]), compact(weight), first=100)[0], torch.zeros(321).bfloat16())


class TestWriting:
    def test_slabs(self):
        weight, packed = usual(50, 77), empty_compact_weight(50, 77, segments=2)
        for start in range(0, 50, 13):
            packed.write(weight[start : start + 13], row=start)
        assert torch.equal(packed.read(), weight)  # also before it is settled
        packed.settle()
        assert torch.equal(packed.read(), weight)

    def test_what_is_not_written_is_zero_and_what_was_stays(self):
        weight, packed = usual(50, 77), empty_compact_weight(50, 77)
        x = torch.ones(1, 77, dtype=torch.bfloat16)
        assert torch.equal(linear(x, packed), torch.zeros(1, 50).bfloat16())
        packed.write(weight[10:20], row=10)
        packed.settle()
        packed.write(weight[30:31, 5:9], row=30, column=5)
        packed.settle()
        expected = torch.zeros_like(weight)
        expected[10:20], expected[30, 5:9] = weight[10:20], weight[30, 5:9]
        assert torch.equal(packed.read(), expected)

    def test_the_memory_stays_where_it_is(self):
        first, second = usual(64, 96), any_bits(64, 96).nan_to_num(0.0, 0.0, 0.0)
        packed = compact(first)
        pointer, size = packed.storage_pointer, packed.num_bytes
        packed.write(second)
        packed.settle()
        packed.settle()
        assert (packed.storage_pointer, packed.storage.data_ptr()) == (pointer, pointer)
        assert torch.equal(packed.read(), second)
        assert packed.num_bytes > size
        packed.write(first)
        packed.settle()
        assert packed.num_bytes == size

    def test_it_needs_no_second_copy(self, monkeypatch):
        """Drafts of blocks are borrowed, one after the other, and let go of in the end."""
        monkeypatch.setattr(compact_weight, "_BLOCK_BYTES", 2 * 32 * 96)  # a panel: 16 rows of each half
        arena = WeightArena()
        weights = [usual(128, 96, seed=seed) for seed in range(3)]
        held = [empty_compact_weight(128, 96, segments=2, is_filled=True, arena=arena) for _ in weights]
        drafts = set()
        for packed, weight in zip(held, weights, strict=True):
            for row in range(0, 64, 8):
                for first in (row, 64 + row):
                    packed.write(weight[first : first + 8], row=first)
                    drafts |= {each.plain.storage_pointer for each in packed.contents.drafts.values()}
                    assert len(packed.contents.drafts) <= 1
            assert not packed.contents.drafts  # before it is settled
            packed.write(weight)
            assert not packed.contents.drafts
        assert len(drafts) == 1
        arena.keep_nothing()
        assert all(torch.equal(packed.read(), weight) for packed, weight in zip(held, weights, strict=True))
        assert arena.lend(100).data_ptr() not in drafts

    @pytest.mark.parametrize("segments", [1, 2])
    @pytest.mark.parametrize("make", WEIGHTS.values(), ids=WEIGHTS)
    def test_blocks_of_any_size_and_rows_in_any_order(self, make, segments, monkeypatch):
        monkeypatch.setattr(compact_weight, "_BLOCK_BYTES", 1)
        weight, packed = make(130, 75), empty_compact_weight(130, 75, segments=segments)
        packed.write(weight[64:], row=64)
        packed.write(weight[:64])
        assert torch.equal(bits(packed.read()), bits(weight))
        packed.write(weight[:5] * 0, row=40)
        packed.settle()
        packed.write(weight[32:64, 11:], row=32, column=11)
        packed.write(weight[32:64, :11], row=32)
        packed.settle()
        assert not packed.contents.drafts
        assert torch.equal(bits(packed.read()), bits(weight))
        assert torch.equal(bits(packed.read(row=33, num_rows=70)), bits(weight[33:103]))

    def test_a_reused_draft_leaves_nothing_behind(self):
        arena = WeightArena()
        full, part = empty_compact_weight(50, 33, arena=arena), empty_compact_weight(50, 33, arena=arena)
        full.write(usual(50, 33))
        full.settle()
        part.write(usual(2, 33, seed=2), row=7)
        part.settle()
        assert part.read()[:7].count_nonzero() == part.read()[9:].count_nonzero() == 0


def test_size():
    weight = usual(640, 1024)
    packed = compact(weight)
    assert packed.num_bytes == num_compact_bytes(640, 1024)
    assert packed.num_bytes / pack(weight).num_bytes == pytest.approx(0.755, abs=0.01)


def test_every_level_compresses_alike(native_library):
    """What one level has written, any other reads."""
    weight, level = usual(130, 320), native_library.isa_level
    packed = compact(weight)
    for other in native_library.isa_levels:
        native_library.set_isa_level(other)
        assert torch.equal(packed.read(), weight)
        x = torch.randn(3, 320, generator=torch.Generator().manual_seed(0)).bfloat16()
        assert torch.equal(linear(x, packed), linear(x, pack(weight)))
    native_library.set_isa_level(level)


def test_the_layout_is_what_it_is_said_to_be():
    """[header 64][list 64][step][group][low, low, codes]; weight (35, 5) is panel 1, line 4 = group 1, word 7."""
    weight = usual(64, 32)
    panel = compact(weight).storage[:-8192].view(2, -1)[1]
    table, group = panel[:16], panel[128 + 192 : 128 + 384]
    place = 7 // 8 * 16 + 7 % 8
    code = int(group[128 + place]) & 15
    word = int(group[place]) | int(table[code]) << 8
    assert word == int(bits(weight)[35, 5]) & 0xFFFF


class TestWithoutMemory:
    """The lists that are too long for panels find no memory."""

    @pytest.fixture
    def fail(self, monkeypatch):
        def failing(num_bytes: int) -> torch.Tensor:
            raise MemoryError(f"{num_bytes} bytes cannot be allocated")

        return lambda: monkeypatch.setattr(compact_weight, "zeroed_bytes", failing)

    def test_what_was_written_is_compressed_later(self, fail, monkeypatch):
        weight, packed = any_bits(130, 320), empty_compact_weight(130, 320)
        fail()
        with pytest.raises(MemoryError, match="bytes cannot be allocated"):
            packed.write(weight)
        with pytest.raises(MemoryError, match="bytes cannot be allocated"):
            packed.settle()
        assert torch.equal(bits(packed.read()), bits(weight))
        linear(torch.ones(3, 320, dtype=torch.bfloat16), packed)  # of no use, but it reads no memory that is gone
        monkeypatch.undo()
        packed.settle()
        assert not packed.contents.drafts
        assert torch.equal(bits(packed.read()), bits(weight))

    def test_what_was_there_before_always_fits(self, fail):
        before = usual(64, 320)
        before[:, ::2] = any_bits(64, 320)[:, ::2]
        packed = compact(before)
        fail()
        with pytest.raises(MemoryError, match="bytes cannot be allocated"):
            packed.write(any_bits(64, 320))
        packed.write(before)
        packed.settle()
        assert torch.equal(bits(packed.read()), bits(before))

    def test_no_memory_in_the_kernel(self, monkeypatch):
        def without_memory(*values: object) -> None:
            ctypes.c_int64.from_address(values[3]).value = (1 << 62) - 1  # as compact.cpp does

        weight, packed = usual(64, 96), empty_compact_weight(64, 96)
        monkeypatch.setattr(compact_weight, "_compress", without_memory)
        with pytest.raises(MemoryError, match="no memory to compress a panel of 96 columns"):
            packed.write(weight)
        assert torch.equal(packed.read(), weight)


class TestRefusals:
    def test_sizes(self):
        with pytest.raises(ValueError, match="segments=2"):
            empty_compact_weight(7, 8, segments=2)
        with pytest.raises(ValueError, match="more than a compact weight can have"):
            empty_compact_weight(1, (1 << 18) + 1)

    def test_slabs(self):
        packed = empty_compact_weight(8, 8)
        with pytest.raises(ValueError, match="cannot be packed into"):
            packed.write(torch.zeros(8, 8))
        with pytest.raises(ValueError, match="does not fit a weight"):
            packed.write(torch.zeros(4, 8, dtype=torch.bfloat16), row=5)
        with pytest.raises(ValueError, match="does not fit a weight"):
            packed.read(row=-1, num_rows=2)
        with pytest.raises(ValueError, match="read as it is"):
            compact(usual(8, 8)).read(dtype=torch.float32)
