"""The twins of the elementwise kernels against the functions of torch and Hugging Face, in float64 where that helps."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from inference_shardformer.kernels import reference


def noise(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rms_norm_rounds_where_llama_does(dtype):
    x, norm = noise(64, 48, dtype=dtype), LlamaRMSNorm(48, eps=1e-3).to(dtype)
    norm.weight.data = noise(48, dtype=dtype, seed=1)
    expected = norm(x).detach()
    assert torch.equal(reference.rms_norm(x, norm.weight.data, 1e-3, rounds_before_weight=True), expected)
    assert not torch.equal(reference.rms_norm(x, norm.weight.data, 1e-3), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rms_norm_with_an_offset_is_that_of_gemma(dtype):
    x, norm = noise(64, 48, dtype=dtype), GemmaRMSNorm(48, eps=1e-3).to(dtype)
    norm.weight.data = noise(48, dtype=dtype, seed=1)
    found = reference.rms_norm(x, norm.weight.data, 1e-3, weight_offset=1.0)
    torch.testing.assert_close(found, norm(x).detach(), rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_a_residual_takes_the_input_up_and_is_normalised():
    x, residual, weight, bias = noise(3, 8), noise(3, 8, seed=1), noise(8, seed=2), noise(8, seed=3)
    total, first, second = x + residual, residual.clone(), residual.clone()
    found = reference.rms_norm(x, weight, 1e-5, residual=first)
    torch.testing.assert_close(found, functional.rms_norm(total, (8,), weight, 1e-5))
    found = reference.layer_norm(x, weight, bias, 1e-5, residual=second)
    torch.testing.assert_close(found, functional.layer_norm(total, (8,), weight, bias, 1e-5))
    assert torch.equal(first, total)
    assert torch.equal(second, total)


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("has_weight", [True, False])
def test_layer_norm(has_weight, has_bias):
    x, weight, bias = noise(3, 8), noise(8) if has_weight else None, noise(8, seed=1) if has_bias else None
    expected = functional.layer_norm(x, (8,), weight, bias, 1e-5)
    torch.testing.assert_close(reference.layer_norm(x, weight, bias, 1e-5), expected)


def test_gelu_and_mul():
    gate, up = noise(5, 24), noise(5, 24, seed=1)
    expected = functional.gelu(gate, approximate="tanh") * up
    torch.testing.assert_close(reference.gelu_and_mul(torch.cat((gate, up), dim=-1)), expected)


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_rotary_writes_what_the_parts_would(layout):
    heads, kv_heads, head_dim, slots = 4, 2, 8, torch.tensor([5, 0, 3])
    qkv, half = noise(3, (heads + 2 * kv_heads) * head_dim), torch.rand(3, 4, dtype=torch.float64)
    cos, sin = half.cos().repeat(1, 2), half.sin().repeat(1, 2)
    caches = [torch.zeros(2, 4, kv_heads, head_dim, dtype=torch.float64) for _ in range(4)]
    q, k, v = qkv.view(3, -1, head_dim).split((heads, kv_heads, kv_heads), dim=1)
    expected_q, expected_k = reference.apply_rotary(q, k, cos, sin)
    reference.write_kv(expected_k, v, *caches[:2], slots)
    own = [cache if layout == "NHD" else cache.transpose(1, 2).contiguous() for cache in caches[2:]]
    assert torch.equal(reference.rotary_and_write_kv(qkv, *own, slots, cos=cos, sin=sin, layout=layout), expected_q)
    for cache, expected in zip(own, caches[:2], strict=True):
        assert torch.equal(cache if layout == "NHD" else cache.transpose(1, 2), expected)


def test_rotary_of_a_part_leaves_the_rest_and_a_negative_slot_stores_nothing():
    qkv, angle = noise(1, 3 * 8), torch.full((1, 4), 0.5, dtype=torch.float64)
    k_cache, v_cache = torch.zeros(1, 2, 1, 8, dtype=torch.float64), torch.zeros(1, 2, 1, 8, dtype=torch.float64)
    given = {"cos": angle.cos(), "sin": angle.sin()}
    q = reference.rotary_and_write_kv(qkv, k_cache, v_cache, torch.tensor([-1]), **given)
    assert torch.equal(q[0, 0, 4:], qkv[0, 4:8])
    torch.testing.assert_close(q[0, 0, :4].norm(), qkv[0, :4].norm())
    assert not torch.equal(q[0, 0, :4], qkv[0, :4])
    assert k_cache.eq(0).all()
    assert v_cache.eq(0).all()


def test_a_table_holds_the_angles_by_position():
    qkv, positions, slots = noise(2, 3 * 4), torch.tensor([3, 1]), torch.tensor([0, 1])
    half = torch.arange(5.0)[:, None] * torch.tensor([1.0, 0.1])
    table = torch.cat((half.cos(), half.sin()), dim=-1)
    both = half[positions].repeat(1, 2)
    caches = [torch.zeros(1, 2, 1, 4, dtype=torch.float64) for _ in range(4)]
    first = reference.rotary_and_write_kv(qkv, *caches[:2], slots, cos=both.cos(), sin=both.sin())
    second = reference.rotary_table_and_write_kv(qkv, *caches[2:], slots, table=table, positions=positions)
    assert torch.equal(first, second)
    assert all(torch.equal(a, b) for a, b in zip(caches[:2], caches[2:], strict=True))


def test_the_greatest_are_in_order_and_the_first_among_equals():
    x = torch.tensor([[1.0, 3.0, 3.0, -2.0], [0.0, float("nan"), 5.0, float("nan")]])
    values, indices = reference.topk(x, 3)
    assert indices.tolist() == [[1, 2, 0], [1, 3, 2]]
    assert values[0].tolist() == [3.0, 3.0, 1.0]
    best, where = reference.argmax(x)
    assert where.tolist() == [1, 1]
    assert best[0] == 3.0
    assert best[1].isnan()


def test_add_rounds_once():
    a, b = noise(100, dtype=torch.bfloat16), noise(100, dtype=torch.bfloat16, seed=1)
    assert torch.equal(reference.add(a, b), (a.double() + b.double()).to(torch.bfloat16))
