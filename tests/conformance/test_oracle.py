"""The kit's oracle against torch's and Hugging Face's own attention: nobody else checks it."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward as gemma2_attention

from inference_shardformer.conformance.cases import Case
from inference_shardformer.conformance.oracle import dense_attention

PROMPT = Case(((0, 23),), num_kv_heads=2, gqa_ratio=3, head_dim=8)
SCALE = 0.4


def draw(case: Case):
    gen = torch.Generator().manual_seed(0)
    ((past, new),) = case.sequences
    q = torch.randn(new, case.num_kv_heads * case.gqa_ratio, case.head_dim, generator=gen, dtype=torch.float64)
    k, v = torch.randn(2, past + new, case.num_kv_heads, case.head_dim, generator=gen, dtype=torch.float64)
    return q, k, v


def heads_first(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [tensor.transpose(0, 1)[None] for tensor in tensors]


def hidden(case: Case) -> torch.Tensor:
    """True where a query must not look, `[new, past + new]`, written out."""
    ((past, new),) = case.sequences
    rows = []
    for query in range(past, past + new):
        rows.append(
            [key > query or (case.window is not None and key <= query - case.window) for key in range(past + new)]
        )
    return torch.tensor(rows)


@pytest.mark.parametrize(
    "case",
    [
        PROMPT,
        replace(PROMPT, sequences=((40, 1),)),
        replace(PROMPT, sequences=((5, 18),)),
        replace(PROMPT, window=1),
        replace(PROMPT, sequences=((5, 18),), window=7),
        replace(PROMPT, num_kv_heads=1, gqa_ratio=5),
        replace(PROMPT, num_kv_heads=3, gqa_ratio=1),
    ],
    ids=["prompt", "decode", "chunk", "window_1", "window_7", "one_kv_head", "as_many_kv_heads"],
)
def test_equals_torch(case: Case) -> None:
    q, k, v = draw(case)
    whole = [tensor.repeat_interleave(case.gqa_ratio, dim=1) for tensor in (k, v)]
    query, key, value = heads_first(q, *whole)
    theirs = scaled_dot_product_attention(query, key, value, attn_mask=~hidden(case), scale=SCALE)
    torch.testing.assert_close(dense_attention(case, SCALE, q, [(k, v)], None), theirs[0].transpose(0, 1))


def as_module(case: Case, **attributes: object) -> SimpleNamespace:
    return SimpleNamespace(num_key_value_groups=case.gqa_ratio, training=False, head_dim=case.head_dim, **attributes)


def additive(case: Case) -> torch.Tensor:
    mask = torch.zeros(hidden(case).shape, dtype=torch.float64).masked_fill(hidden(case), -torch.inf)
    return mask[None, None]


@pytest.mark.parametrize("softcap", [0.5, 3.0])
def test_a_cap_equals_gemma2(softcap: float) -> None:
    case = replace(PROMPT, softcap=softcap)
    q, k, v = draw(case)
    theirs, _ = gemma2_attention(as_module(case), *heads_first(q, k, v), additive(case), scaling=SCALE, softcap=softcap)
    ours = dense_attention(case, SCALE, q, [(k, v)], None)
    torch.testing.assert_close(ours, theirs[0].double(), rtol=0, atol=1e-6)  # theirs has a softmax in fp32


def test_sinks_equal_gpt_oss() -> None:
    gpt_oss = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss")
    case = replace(PROMPT, sinks=True)
    q, k, v = draw(case)
    sinks = torch.linspace(-1, 2, q.shape[1], dtype=torch.float64)
    module = as_module(case, sinks=sinks)
    theirs, _ = gpt_oss.eager_attention_forward(module, *heads_first(q, k, v), additive(case), scaling=SCALE)
    ours = dense_attention(case, SCALE, q, [(k, v)], sinks)
    torch.testing.assert_close(ours, theirs[0].double(), rtol=0, atol=1e-6)
