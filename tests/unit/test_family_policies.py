"""Policies of the families: their facts, what they refuse by name, and how checkpoints keep their tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from family_models import FAMILIES, IS_OLD, family_config, family_model
from torch import nn

from inference_shardformer.errors import PolicyError, TensorParallelSizeError, UnsupportedModelError
from inference_shardformer.policies.baichuan import BaichuanPolicy
from inference_shardformer.policies.base import Policy
from inference_shardformer.policies.gpt_neox import GPTNeoXPolicy
from inference_shardformer.policies.registry import policy_for, supported_architectures
from inference_shardformer.policies.served import check_served
from inference_shardformer.policies.windows import no_windows
from inference_shardformer.sharded import plan_ranks
from inference_shardformer.sharding.plan import TensorInfo
from inference_shardformer.sharding.stored import StoredTensor, row_infos, stored_infos, stored_views, with_stored_names

ROOT = Path(__file__).parents[2]
NEW = pytest.mark.skipif(IS_OLD, reason="this release of transformers does not know the field")


def _policy(case: str) -> Policy:
    return policy_for(_architecture(case))


def _architecture(case: str) -> str:
    return type(family_model(case)).__name__


def _facts(case: str, **changed: Any) -> Any:
    config = family_config(case)
    for name, value in changed.items():
        setattr(config, name, value)
    return _policy(case).facts(config)


@pytest.mark.parametrize(
    ("case", "windows"),
    [
        ("mistral", ()),
        ("mistral_window", (7, 7, 7)),
        ("qwen2", ()),
        pytest.param("qwen2_window", (None, 7, 7), marks=NEW),
        pytest.param("qwen3_biased_window", (None, None, 7), marks=NEW),
        ("phi3_partial_window", (7, 7, 7)),
        ("gemma2", (7, None, 7)),
        ("gemma3", (7, None, 7)),
        ("gemma3_linear_rope", (7, 7, None)),
        ("mixtral_window", (7, 7, 7)),
        ("qwen3_moe", ()),
    ],
)
def test_windows_of_layers(case: str, windows: tuple[int | None, ...]) -> None:
    assert _facts(case).sliding_windows == windows


def test_facts_that_change_the_scores() -> None:
    facts = _facts("gemma2")
    assert facts.attention_scale == 10**-0.5
    assert facts.attention_softcap == 3.0
    assert _facts("gemma2_uncapped_untied").attention_softcap is None
    assert _facts("gemma3").attention_softcap is None
    assert _facts("mistral").attention_scale is None


def test_facts_that_change_the_mlp() -> None:
    assert _facts("gemma3").activation == "gelu_pytorch_tanh"
    assert _facts("gpt_neox").activation == ""
    assert _facts("qwen3_moe").intermediate_size == 24


def test_longrope_switches_at_the_original_length() -> None:
    assert _facts("phi3_longrope").rope_switch_length == 25
    assert _facts("phi3").rope_switch_length is None


@pytest.mark.parametrize(
    ("case", "changed", "said"),
    [
        ("mistral_window", {"layer_types": ["full_attention"] * 3}, r"layer_types \['full_attention'\]"),
        ("mistral_window", {"sliding_window": 0}, "sliding_window=0"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 3}, r"layer_types \['sliding_attention'\]"),
        ("gemma2", {"layer_types": ["chunked_attention"] * 3}, "chunked_attention"),
        ("gemma2", {"layer_types": ["full_attention"]}, "layer_types"),
        ("gemma2", {"sliding_window": None}, "sliding_window=None"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ("gemma3", {"attn_logit_softcapping": 30.0}, r"attn_logit_softcapping=30\.0"),
        ("gemma3", {"rope_parameters": {"full_attention": {"rope_type": "dynamic"}}}, "dynamic"),
        ("mixtral", {"output_router_logits": True}, "output_router_logits=True"),
        ("qwen3_moe", {"use_sliding_window": True}, "use_sliding_window=True"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, r"mlp_only_layers=\[1\]"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step=2"),
        ("gpt_neox", {"sliding_window": 5}, "sliding_window=5"),
        ("baichuan", {"sliding_window": 5}, "sliding_window=5"),
        pytest.param("opt", {"word_embed_proj_dim": 32}, "word_embed_proj_dim=32", marks=NEW),
        pytest.param("opt", {"do_layer_norm_before": False}, "do_layer_norm_before=False", marks=NEW),
        pytest.param("opt", {"_remove_final_layer_norm": True}, "_remove_final_layer_norm=True", marks=NEW),
    ],
)
def test_what_is_not_served_is_refused_by_name(case: str, changed: dict[str, Any], said: str) -> None:
    with pytest.raises(UnsupportedModelError, match=said):
        _facts(case, **changed)


@pytest.mark.skipif(not IS_OLD, reason="newer releases hand the packed batch on")
def test_old_opt_is_refused() -> None:
    from transformers import OPTConfig

    with pytest.raises(UnsupportedModelError, match="does not hand the packed batch"):
        policy_for("OPTForCausalLM").facts(OPTConfig(hidden_size=8, num_attention_heads=2))


def test_absent_fields_and_empty_lists_count_as_unset() -> None:
    config = family_config("mistral")
    config.some_list = []
    check_served(config, "Some", {"some_list": None, "some_flag": False})
    assert no_windows(config) == ()


@pytest.mark.parametrize("case", FAMILIES)
@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_plans_hold_every_stored_element(case: str, tp_size: int) -> None:
    """The ranks' slices of every checkpoint tensor cover it, and plans are made without a weight."""
    model, policy = family_model(case), _policy(case)
    facts = policy.facts(model.config)
    infos = {name: TensorInfo(tuple(tensor.shape), "F32") for name, tensor in model.state_dict().items()}
    expected = stored_infos(policy.stored(infos), infos)
    covered: dict[str, set[tuple[int, int]]] = {}
    for plan in plan_ranks(policy, facts, model.to("meta"), tp_size=tp_size):
        for parameter in plan.parameters:
            for part in parameter.slices:
                places = {(part.dim, place) for place in range(part.start, part.stop)}
                covered.setdefault(part.tensor, set()).update(places)
    assert set(covered) == set(expected) - policy.optional_tensors(facts)
    for name, places in covered.items():
        (dim,) = {dim for dim, _ in places}
        assert len(places) == expected[name].shape[dim], name


def test_experts_must_divide() -> None:
    facts = _facts("mixtral", intermediate_size=42)
    with pytest.raises(TensorParallelSizeError, match="intermediate_size=42"):
        _policy("mixtral").check_tp_size(facts, 4)


@pytest.mark.parametrize("case", ["mixtral", "qwen3_moe", "gpt_neox"])
def test_stored_names_are_those_that_hugging_face_saves(case: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model, policy = family_model(case), _policy(case)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    infos = {name: TensorInfo(tuple(tensor.shape), "F32") for name, tensor in model.state_dict().items()}
    views = stored_views(policy.stored(infos), model.state_dict())
    assert views.keys() == saved.keys()
    for name, view in views.items():
        assert torch.equal(view, saved[name]), name


def test_old_buffers_of_gpt_neox_may_be_there() -> None:
    facts = _facts("gpt_neox")
    assert "gpt_neox.layers.2.attention.masked_bias" in GPTNeoXPolicy().optional_tensors(facts)
    assert "embed_out.weight" not in GPTNeoXPolicy().optional_tensors(facts)
    assert "embed_out.weight" in GPTNeoXPolicy().optional_tensors(_facts("gpt_neox_sequential_tied"))


def test_parts_of_a_stored_tensor() -> None:
    whole = torch.arange(24.0).view(2, 4, 3)
    part = StoredTensor("file", row="row", tensor="model", index=1, rows=(2, 4))
    assert torch.equal(part.view(whole), whole[1, 2:4])
    assert part.info(TensorInfo((2, 4, 3), "F32")) == TensorInfo((2, 3), "F32")
    assert row_infos([part], {"model": TensorInfo((2, 4, 3), "F32")}) == {"row": TensorInfo((2, 3), "F32")}


def test_one_stored_name_for_two_tensors_is_an_error() -> None:
    model = family_model("mistral")
    (plan,) = plan_ranks(_policy("mistral"), _facts("mistral"), model, tp_size=1)
    twice = [StoredTensor("file", row="a", tensor="a"), StoredTensor("file", row="b", tensor="b")]
    with pytest.raises(PolicyError, match="named twice"):
        with_stored_names(plan, twice)


def test_class_that_only_derives_from_a_plain_one_is_refused() -> None:
    class NormHead(nn.Linear):
        pass

    class OtherEmbedding(nn.Embedding):
        pass

    policy, model = BaichuanPolicy(), family_model("baichuan")
    by_pattern = {entry.row.pattern: entry for entry in policy.table(policy.facts(model.config))}
    (plan,) = plan_ranks(policy, policy.facts(model.config), model, tp_size=1)
    planned = {module.path: module for module in plan.modules}
    for path, native in (("lm_head", NormHead(1, 1)), ("model.embed_tokens", OtherEmbedding(1, 1))):
        with pytest.raises(PolicyError, match=f"{path} is a {type(native).__name__}"):
            by_pattern[path].build(planned[path], native, None)


def test_scaled_embedding_of_another_class_is_refused() -> None:
    class OtherEmbedding(nn.Embedding):
        pass

    policy, model = _policy("gemma2"), family_model("gemma2")
    facts = policy.facts(model.config)
    (plan,) = plan_ranks(policy, facts, model, tp_size=1)
    planned = next(module for module in plan.modules if module.path == "model.embed_tokens")
    entry = next(entry for entry in policy.table(facts) if entry.row.pattern == "model.embed_tokens")
    with pytest.raises(PolicyError, match="OtherEmbedding, but the policy replaces Gemma2TextScaledWordEmbedding"):
        entry.build(planned, OtherEmbedding(1, 1), None)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "mixtral", "baichuan"])
def test_a_llama_shaped_family_costs_sixty_lines(family: str) -> None:
    lines = (ROOT / "policies" / f"{family}.py").read_text().splitlines()
    assert len(lines) <= 60


def test_every_policy_has_a_tested_model_and_a_line_in_the_docs() -> None:
    tested = {_architecture(case) for case in FAMILIES} | {"LlamaForCausalLM"}  # test_parity
    assert tested | ({"OPTForCausalLM"} if IS_OLD else set()) == set(supported_architectures())
    documented = (ROOT / "docs" / "models.md").read_text()
    assert [name for name in supported_architectures() if f"| `{name}` |" not in documented] == []
