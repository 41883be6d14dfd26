"""The native rotary kernel with its cache write, at every level of the machine, against its twin and Hugging Face."""

from __future__ import annotations

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from inference_shardformer.kernels import reference
from inference_shardformer.kernels.cpu import rotary

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# heads, KV heads, size of a head, how much of it turns
SHAPES = {"llama": (9, 3, 64, 64), "partial": (4, 4, 80, 32), "odd": (2, 1, 20, 12), "large": (2, 2, 128, 128)}
TOKENS, BLOCKS, BLOCK_SIZE = 5, 4, 4
SLOTS = torch.tensor([0, 9, -1, 15, 3])  # the third token is not stored

pytestmark = pytest.mark.usefixtures("isa_level")


def noise(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def angles(rotary_dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    half = torch.arange(TOKENS)[:, None] * 100.0 ** -torch.linspace(0, 1, rotary_dim // 2)
    both = torch.cat((half, half), dim=-1)
    return both.cos().to(dtype), both.sin().to(dtype)


def caches(layout: str, kv_heads: int, head_dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values full of a mark, so that a write beside a slot shows."""
    inner = (BLOCK_SIZE, kv_heads) if layout == "NHD" else (kv_heads, BLOCK_SIZE)
    return tuple(torch.full((BLOCKS, *inner, head_dim), mark, dtype=dtype) for mark in (-7.0, 7.0))


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("source", ["rows", "table"])
def test_against_the_twin(shape, dtype, layout, source):
    heads, kv_heads, head_dim, rotary_dim = shape
    qkv = noise(TOKENS, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
    cos, sin = angles(rotary_dim, dtype)
    given = {"cos": cos, "sin": sin}
    name = "rotary_and_write_kv"
    if source == "table":
        name = "rotary_table_and_write_kv"
        cos, sin = angles(rotary_dim, torch.float32)
        table = torch.cat((cos[:, : rotary_dim // 2], sin[:, : rotary_dim // 2]), dim=-1)
        given = {"table": table.roll(1, 0), "positions": (torch.arange(TOKENS) + 1) % TOKENS}
    found, expected = caches(layout, kv_heads, head_dim, dtype), caches(layout, kv_heads, head_dim, torch.float64)
    out = getattr(rotary, name)(qkv, *found, SLOTS, layout=layout, **given)
    wide = {key: value if key in ("positions", "table") else value.double() for key, value in given.items()}
    exact = getattr(reference, name)(qkv.double(), *expected, SLOTS, layout=layout, **wide)
    # one rounding of a sum of two products, each of which may exceed the sum
    unit, largest = torch.finfo(dtype).eps / 2, qkv.double().abs().max() * 2
    for actual, wanted in ((out, exact), (found[0], expected[0]), (found[1], expected[1])):
        assert actual.dtype == dtype
        assert ((actual.double() - wanted).abs() <= unit * 1.01 * wanted.abs() + largest * 2.0**-22).all()
    assert torch.equal(found[1].double(), expected[1])  # values are copied


def test_equals_hugging_face():
    qkv, (cos, sin) = noise(TOKENS, 5 * 64, dtype=torch.float32), angles(64, torch.float32)
    k_cache, v_cache = caches("NHD", 1, 64, torch.float32)
    q = rotary.rotary_and_write_kv(qkv, k_cache, v_cache, torch.arange(TOKENS), cos=cos, sin=sin)
    heads = qkv.view(1, TOKENS, 5, 64).transpose(1, 2)
    expected_q, expected_k = apply_rotary_pos_emb(heads[:, :3], heads[:, 3:4], cos[None], sin[None])
    torch.testing.assert_close(q, expected_q[0].transpose(0, 1))
    torch.testing.assert_close(k_cache.flatten(0, 1)[:TOKENS], expected_k[0].transpose(0, 1))
    assert torch.equal(v_cache.flatten(0, 1)[:TOKENS, 0], qkv[:, 4 * 64 :])


def test_strided_input_and_given_output():
    wide, (cos, sin) = noise(TOKENS, 400, dtype=torch.float32), angles(16, torch.float32)
    q_out = torch.empty(TOKENS, 2, 16)
    results = []
    for qkv in (wide[:, 8 : 8 + 64], wide[:, 8 : 8 + 64].contiguous()):
        k_cache, v_cache = caches("NHD", 1, 16, torch.float32)
        assert rotary.rotary_and_write_kv(qkv, k_cache, v_cache, SLOTS, cos=cos, sin=sin, q_out=q_out) is q_out
        results.append((q_out.clone(), k_cache, v_cache))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


class TestRefusals:
    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"cos": torch.ones(4, 16)}, "a row for each of the 5"),
            ({"cos": torch.ones(5, 16).double()}, "must be alike"),
            ({"qkv": torch.ones(5, 60)}, "whole heads"),
            ({"cos": torch.ones(5, 18), "sin": torch.ones(5, 18)}, "rotary_dim=18"),
            ({"slot_mapping": SLOTS.int()}, "slot_mapping is torch.int32"),
            ({"v_cache": torch.ones(4, 4, 1, 16).half()}, "must be alike in shape"),
            ({"q_out": torch.ones(5, 1, 16)}, "out is"),
        ],
    )
    def test_is_named(self, changes, said):
        k_cache, v_cache = caches("NHD", 1, 16, torch.float32)
        plain = {"qkv": torch.ones(5, 64), "k_cache": k_cache, "v_cache": v_cache, "slot_mapping": SLOTS}
        cos, sin = angles(16, torch.float32)
        with pytest.raises(ValueError, match=said):
            rotary.rotary_and_write_kv(**(plain | {"cos": cos, "sin": sin} | changes))

    def test_a_table_in_another_type(self):
        k_cache, v_cache = caches("NHD", 1, 16, torch.float32)
        given = {"table": torch.ones(8, 16).half(), "positions": torch.arange(5)}
        with pytest.raises(ValueError, match="table is torch"):
            rotary.rotary_table_and_write_kv(torch.ones(5, 64), k_cache, v_cache, SLOTS, **given)
