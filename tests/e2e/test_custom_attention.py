"""Attention classes of the user's own: found, never skipped; adapted, or left out on purpose."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tiny_models import tiny_model
from torch import nn
from transformers.models.llama.modeling_llama import LlamaAttention

from inference_shardformer import InferenceConfig, InferenceShardformer, ShardConfig
from inference_shardformer.errors import PolicyError
from inference_shardformer.policies.llama import LlamaPolicy
from inference_shardformer.sharding.plan import PlanContext, RankLayout, TensorInfo
from inference_shardformer.sharding.planner import make_plan

DOCUMENT = Path(__file__).parents[2] / "docs" / "custom-attention.md"


class MyAttention(LlamaAttention):
    """Takes what the engine passes."""

    def forward(self, hidden_states, *args, attn_metadata=None, **kwargs):
        raise NotImplementedError


def _with_mine() -> nn.Module:
    model = tiny_model("gqa")
    model.model.layers[1].self_attn.__class__ = MyAttention
    return model


def test_the_examples_of_the_document_run() -> None:
    program = "\n\n".join(re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), flags=re.DOTALL))
    assert program.count("assert ") == 3
    exec(compile(program, str(DOCUMENT), "exec"), {"__name__": "custom_attention_document"})


def test_an_unknown_class_is_refused_with_both_ways_out() -> None:
    with InferenceShardformer(ShardConfig(device="cpu"), InferenceConfig(dtype="fp32")) as shardformer:
        with pytest.raises(PolicyError, match=r"layers\.1\.self_attn is a MyAttention") as caught:
            shardformer.optimize(_with_mine())
    assert "adapting(MyAttention, build)" in caught.value.remedy
    assert "leaving_out(MyAttention)" in caught.value.remedy


def test_a_class_that_cannot_take_the_batch_cannot_be_left_out() -> None:
    class Plain(LlamaAttention):
        def forward(self, hidden_states):
            return hidden_states, None

    with pytest.raises(PolicyError, match="Plain cannot be left out: its forward has no parameter `attn_metadata`"):
        LlamaPolicy().leaving_out(Plain)


def test_a_class_is_named_once() -> None:
    with pytest.raises(PolicyError, match="adapted or left out already"):
        LlamaPolicy().leaving_out(MyAttention).adapting(MyAttention, lambda *_: nn.Identity())


def test_a_policy_is_not_changed_by_adapting() -> None:
    policy = LlamaPolicy()
    assert "MyAttention" in policy.leaving_out(MyAttention).adapters.describe()
    assert "MyAttention" not in policy.adapters.describe()


def test_modules_left_out_need_one_rank() -> None:
    model = _with_mine()
    policy = LlamaPolicy().leaving_out(MyAttention)
    facts = policy.facts(model.config)
    with pytest.raises(PolicyError, match=r"1 module\(s\) are left out, model\.layers\.1\.self_attn"):
        make_plan(
            [entry.row for entry in policy.full_table(facts)],
            tensors={name: TensorInfo(tuple(tensor.shape), "F32") for name, tensor in model.state_dict().items()},
            module_paths=[path for path, _ in model.named_modules() if path],
            context=PlanContext(facts, RankLayout(2, 0)),
            left_out=policy.adapters.left_out_paths(model),
        )


def test_a_row_of_an_adapter_that_matches_nothing_is_an_error() -> None:
    from inference_shardformer.policies.rows import replicate

    policy = LlamaPolicy().adapting(MyAttention, lambda *_: nn.Identity(), rows=(replicate("model.layers.*.gone"),))
    with InferenceShardformer(ShardConfig(device="cpu"), InferenceConfig(dtype="fp32")) as shardformer:
        with pytest.raises(PolicyError, match=r"layers\.\*\.gone"):
            shardformer.optimize(_with_mine(), policy)
