"""The reference kernels against torch's and Hugging Face's own functions."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from inference_shardformer.kernels import reference

DTYPES = {"fp32": (torch.float32, 1e-6), "fp16": (torch.float16, 2e-3), "bf16": (torch.bfloat16, 2e-2)}


@pytest.fixture(params=DTYPES)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return DTYPES[request.param][0]


def assert_close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    tolerance = dict(DTYPES.values())[dtype]
    assert actual.dtype == dtype
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def noise(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_rms_norm_equals_hugging_face(dtype):
    x, norm = noise(5, 48, dtype=dtype), LlamaRMSNorm(48, eps=1e-3).to(dtype)
    norm.weight.data = noise(48, dtype=dtype, seed=1)
    assert_close(reference.rms_norm(x, norm.weight.data, 1e-3), norm(x).detach(), dtype)


def test_rms_norm_uses_eps():
    zeros = torch.zeros(1, 4)
    assert reference.rms_norm(zeros, torch.ones(4), 1e-6).eq(0).all()


def test_apply_rotary_equals_hugging_face(dtype):
    q, k = noise(7, 6, 16, dtype=dtype), noise(7, 2, 16, dtype=dtype, seed=1)
    angles = torch.arange(7)[:, None] * torch.linspace(1, 0.01, 8)
    cos, sin = (torch.cat([f(angles), f(angles)], dim=-1).to(dtype) for f in (torch.cos, torch.sin))
    expected = apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos[None], sin[None])
    for actual, theirs in zip(reference.apply_rotary(q, k, cos, sin), expected, strict=True):
        assert_close(actual, theirs[0].transpose(0, 1), dtype)


def test_silu_and_mul_equals_torch(dtype):
    gate, up = noise(5, 24, dtype=dtype), noise(5, 24, dtype=dtype, seed=1)
    assert_close(reference.silu_and_mul(torch.cat([gate, up], dim=-1)), functional.silu(gate) * up, dtype)


def test_write_kv_puts_each_token_at_its_slot():
    k, v = noise(3, 2, 4, dtype=torch.float32), noise(3, 2, 4, dtype=torch.float32, seed=1)
    k_cache, v_cache = torch.zeros(4, 5, 2, 4), torch.zeros(4, 5, 2, 4)
    reference.write_kv(k, v, k_cache, v_cache, torch.tensor([7, 0, 19]))
    for token, (block, offset) in enumerate([(1, 2), (0, 0), (3, 4)]):
        assert torch.equal(k_cache[block, offset], k[token])
        assert torch.equal(v_cache[block, offset], v[token])
    assert k_cache.ne(0).any(dim=-1).sum() == v_cache.ne(0).any(dim=-1).sum() == 3 * 2


def test_paged_attention_of_one_prompt_equals_torch(dtype):
    q, k, v = (noise(11, 4, 16, dtype=dtype, seed=seed) for seed in range(3))
    k_cache, v_cache = torch.zeros(3, 4, 4, 16, dtype=dtype), torch.zeros(3, 4, 4, 16, dtype=dtype)
    tables = torch.tensor([[2, 0, 1]], dtype=torch.int32)
    slots = torch.tensor([int(tables[0, i // 4]) * 4 + i % 4 for i in range(11)])
    reference.write_kv(k, v, k_cache, v_cache, slots)
    out = reference.paged_attention(
        q,
        k_cache,
        v_cache,
        cu_seqlens_q=torch.tensor([0, 11], dtype=torch.int32),
        seq_lens=torch.tensor([11], dtype=torch.int32),
        block_tables=tables,
        scale=0.25,
    )
    dense = functional.scaled_dot_product_attention(
        *(x.float().transpose(0, 1) for x in (q, k, v)), is_causal=True, scale=0.25
    )
    assert_close(out, dense.transpose(0, 1).to(dtype), dtype)
