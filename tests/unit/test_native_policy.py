"""Rows that keep native modules: how they cut, what they refuse, and the attention function they register."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from families_without_policy import family_config
from torch import nn

from inference_shardformer import derive_policy
from inference_shardformer.attention.reference import ReferenceAttention
from inference_shardformer.attention.spec import AttentionSpec
from inference_shardformer.errors import PolicyError, UnsupportedModelError
from inference_shardformer.layers.width_norm import WidthRMSNorm
from inference_shardformer.modeling.native_attention import paged_attention
from inference_shardformer.policies import native
from inference_shardformer.sharding.plan import ModulePlan, ParameterPlan, PlanContext, RankLayout, TensorInfo

SPEC = AttentionSpec(
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    scale=0.5,
    dtype=torch.float32,
    device=torch.device("cpu"),
    block_size=4,
)


def context(tp_size: int, tp_rank: int, *, heads: int = 4, kv_heads: int = 2) -> PlanContext:
    facts = SimpleNamespace(total_num_heads=heads, total_num_kv_heads=kv_heads, head_dim=4)
    return PlanContext(facts, RankLayout(tp_size, tp_rank))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("is_kv", "tp_size", "expected"),
    [(False, 2, [(0, 8), (8, 16)]), (True, 2, [(0, 4), (4, 8)]), (True, 4, [(0, 4), (0, 4), (4, 8), (4, 8)])],
)
def test_heads_are_cut_and_copied(is_kv: bool, tp_size: int, expected: list[tuple[int, int]]) -> None:
    rows = 8 if is_kv else 16
    tensors = {"a.weight": TensorInfo((rows, 3), "F32"), "a.bias": TensorInfo((rows,), "F32")}
    for rank, (start, stop) in enumerate(expected):
        plans = native.Heads(is_kv=is_kv).plan("a", tensors, context(tp_size, rank))
        assert [(plan.slices[0].start, plan.slices[0].stop) for plan in plans] == [(start, stop)] * 2
        assert plans[0].shape == (stop - start, 3)


def test_rows_that_heads_do_not_share_are_refused() -> None:
    with pytest.raises(PolicyError, match="7 rows"):
        native.Heads().plan("a", {"a.weight": TensorInfo((7, 3), "F32")}, context(2, 0))


def test_a_row_names_the_class_it_exchanges() -> None:
    planned = ModulePlan("a", "a", "heads", (ParameterPlan("a.weight", (4,), ()),))
    with pytest.raises(PolicyError, match="is a LayerNorm"):
        native.width_norm("a", native_class="OddRMSNorm", is_kv=False).build(planned, nn.LayerNorm(4), None)  # type: ignore[arg-type]
    with pytest.raises(PolicyError, match="no module stands"):
        native.head_norm("a", is_kv=False).build(planned, None, None)  # type: ignore[arg-type]


def test_ropes_that_remember_are_refused() -> None:
    config = SimpleNamespace(rope_parameters={"rope_type": "dynamic", "factor": 2.0})
    with pytest.raises(UnsupportedModelError, match="dynamic"):
        native.refuse_length_dependent_rope(config, "OddForCausalLM")  # type: ignore[arg-type]


def test_a_norm_over_ranks_equals_the_whole() -> None:
    from inference_shardformer import simulate

    x, weight = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)), torch.arange(1.0, 9.0)
    expected = weight * x * torch.rsqrt(x.double().pow(2).mean(-1, keepdim=True) + 1e-5)

    def work(rank) -> torch.Tensor:
        group, _ = rank.process_group.join(None)
        norm = WidthRMSNorm(4, total=8, num_copies=1, eps=1e-5, group=group)
        part = slice(4 * rank.tp_rank, 4 * rank.tp_rank + 4)
        norm.weight = nn.Parameter(weight[part], requires_grad=False)
        return norm(x[:, part])

    torch.testing.assert_close(torch.cat(simulate(2, work), dim=-1), expected.float())


def attention(**given: object) -> None:
    module = nn.Identity()
    module.layer_idx, module.backend = 0, ReferenceAttention(SPEC)  # type: ignore[assignment]
    q, kv = torch.zeros(1, 2, 3, 4), torch.zeros(1, 1, 3, 4)
    paged_attention(module, q, kv, kv, None, **{"attn_metadata": SimpleNamespace(), **given})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"scaling": 0.25}, "a scale of 0.25"),
        ({"sliding_window": 4}, "sliding window of 4"),
        ({"softcap": 30.0}, "softcap of 30"),
        ({"s_aux": torch.zeros(2)}, "hands s_aux"),
        ({"attn_metadata": None}, "was not given attn_metadata"),
    ],
)
def test_native_attention_refuses_what_its_backend_was_not_chosen_for(given: dict[str, object], told: str) -> None:
    with pytest.raises(PolicyError, match=told):
        attention(**given)


def test_native_attention_needs_a_backend() -> None:
    module = nn.Identity()
    module.layer_idx, module.backend = 0, None  # type: ignore[assignment]
    with pytest.raises(TypeError, match="no attention backend"):
        paged_attention(module, *[torch.zeros(1, 1, 1, 4)] * 3, None)


def test_a_policy_that_cannot_be_derived_is_refused() -> None:
    config = family_config("BloomForCausalLM")
    if config is None:
        pytest.skip("this transformers has no Bloom")
    with pytest.raises(UnsupportedModelError, match="attention interface"):
        derive_policy(config)
