"""Plans: what each rank holds, and the errors of a table that does not fit its model."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from inference_shardformer.config.model import ModelFacts
from inference_shardformer.errors import CheckpointError, PolicyError, TensorParallelSizeError
from inference_shardformer.policies.llama import LlamaPolicy
from inference_shardformer.policies.registry import policy_for, supported_architectures
from inference_shardformer.policies.rows import replicate
from inference_shardformer.sharding.checkpoint import StateDictSource
from inference_shardformer.sharding.plan import ModulePlan, PlanContext, RankLayout, ShardingPlan, TensorInfo
from inference_shardformer.sharding.planner import Row, StyleRow, make_plan
from inference_shardformer.sharding.styles import Column, Replicate, RowSplit, padded_vocab_part, rank_heads
from inference_shardformer.sharding.weights import check_names


def _model(**settings: object) -> LlamaForCausalLM:
    base = {
        "vocab_size": 23,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "attention_bias": True,
        "mlp_bias": True,
    }
    return LlamaForCausalLM(LlamaConfig(**{**base, **settings}))


def _plan(model: LlamaForCausalLM, layout: RankLayout, rows: tuple[Row, ...] | None = None) -> ShardingPlan:
    policy = LlamaPolicy()
    facts = policy.facts(model.config)
    optional = policy.optional_tensors(facts)
    tensors = {
        name: TensorInfo(tuple(tensor.shape), "F32")
        for name, tensor in model.state_dict().items()
        if name not in optional
    }
    return make_plan(
        rows or tuple(entry.row for entry in policy.table(facts)),
        tensors=tensors,
        module_paths=[path for path, _ in model.named_modules() if path],
        context=PlanContext(facts, layout),
    )


def _read(plan: ShardingPlan, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Every parameter of a plan, filled by plain indexing."""
    source = StateDictSource(state)
    filled = {}
    for parameter in plan.parameters:
        target = torch.zeros(parameter.shape)
        for part in parameter.slices:
            (_, piece), *_ = source.chunks(part)
            target.narrow(part.dim, part.offset, part.stop - part.start).copy_(piece)
        filled[parameter.name] = target
    return filled


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_ranks_together_hold_every_weight_once(tp_size: int) -> None:
    model = _model()
    state = model.state_dict()
    ranks = [_read(_plan(model, RankLayout(tp_size, rank)), state) for rank in range(tp_size)]
    for layer in range(2):
        attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
        queries = torch.cat([rank[f"{attention}.qkv_proj.weight"][: 16 // tp_size] for rank in ranks])
        assert torch.equal(queries, state[f"{attention}.q_proj.weight"])
        outputs = torch.cat([rank[f"{attention}.o_proj.weight"] for rank in ranks], dim=1)
        assert torch.equal(outputs, state[f"{attention}.o_proj.weight"])
        ups = torch.cat([rank[f"{mlp}.gate_up_proj.weight"].chunk(2)[1] for rank in ranks])
        assert torch.equal(ups, state[f"{mlp}.up_proj.weight"])
        for rank in ranks:
            assert torch.equal(rank[f"{mlp}.down_proj.bias"], state[f"{mlp}.down_proj.bias"])
    vocabulary = torch.cat([rank["lm_head.weight"] for rank in ranks])
    assert torch.equal(vocabulary[:23], state["lm_head.weight"])
    assert not vocabulary[23:].any()


@pytest.mark.parametrize(("tp_size", "owners"), [(2, [0, 1]), (4, [0, 0, 1, 1])])
def test_key_value_heads_are_copied_when_there_are_fewer_than_ranks(tp_size: int, owners: list[int]) -> None:
    model = _model()
    keys = model.state_dict()["model.layers.0.self_attn.k_proj.weight"].view(2, 4, 16)
    for rank, owner in enumerate(owners):
        parameters = _read(_plan(model, RankLayout(tp_size, rank)), model.state_dict())
        start = 16 // tp_size
        assert torch.equal(parameters["model.layers.0.self_attn.qkv_proj.weight"][start : start + 4], keys[owner])


def test_tied_head_has_no_parameter_of_its_own() -> None:
    plan = _plan(_model(tie_word_embeddings=True), RankLayout(2, 1))
    assert plan.shared_parameters == (("model.embed_tokens.weight", "lm_head.weight"),)
    assert not [parameter for parameter in plan.parameters if parameter.name.startswith("lm_head")]


def test_last_rank_may_hold_padding_alone() -> None:
    plan = _plan(_model(vocab_size=5), RankLayout(4, 3))
    head = next(parameter for parameter in plan.parameters if parameter.name == "lm_head.weight")
    assert plan.vocab_range == (5, 5)
    assert head.shape == (2, 16)
    assert head.slices == ()


def test_planned_bytes_are_those_of_the_parameters() -> None:
    model = _model()
    plan = _plan(model, RankLayout(2, 0))
    filled = _read(plan, model.state_dict())
    assert plan.num_bytes(4) == sum(tensor.nbytes for tensor in filled.values())


@pytest.mark.parametrize(("total", "tp_size", "expected"), [(8, 4, (6, 2)), (2, 4, (1, 1)), (1, 4, (0, 1))])
def test_heads_of_the_last_rank(total: int, tp_size: int, expected: tuple[int, int]) -> None:
    assert rank_heads(total, tp_size, tp_size - 1) == expected


def test_padded_vocabulary() -> None:
    assert padded_vocab_part(23, 4) == 6


def _rows_without(pattern: str) -> tuple[Row, ...]:
    model = _model()
    rows = tuple(entry.row for entry in LlamaPolicy().table(LlamaPolicy().facts(model.config)))
    return tuple(row for row in rows if row.pattern != pattern)


def test_row_that_matches_nothing_is_an_error() -> None:
    rows = (*_rows_without(""), StyleRow("model.layers.*.self_attn.gate", Replicate()))
    with pytest.raises(PolicyError, match=r"self_attn\.gate' of the policy matches no module"):
        _plan(_model(), RankLayout(1, 0), rows)


def test_parameter_that_no_row_covers_is_an_error() -> None:
    with pytest.raises(PolicyError, match=r"no row of the policy covers 1 parameter\(s\): model\.norm\.weight"):
        _plan(_model(), RankLayout(1, 0), _rows_without("model.norm"))


def test_parameter_that_two_rows_claim_is_an_error() -> None:
    with pytest.raises(PolicyError, match="both claim"):
        _plan(_model(), RankLayout(1, 0), (*_rows_without(""), StyleRow("model.*", Replicate())))


def test_axis_that_does_not_divide_is_an_error() -> None:
    with pytest.raises(PolicyError, match="cannot be cut into tp_size=5"):
        _plan(_model(), RankLayout(5, 0), (*_rows_without("lm_head"), StyleRow("lm_head", RowSplit())))


def test_projections_with_and_without_bias_cannot_be_fused() -> None:
    model = _model()
    model.model.layers[0].self_attn.k_proj.bias = None
    with pytest.raises(PolicyError, match="do not hold the same tensors"):
        _plan(model, RankLayout(1, 0))


def test_head_counts_that_contradict_the_weights_are_an_error() -> None:
    model = _model()
    model.config.head_dim = 8
    with pytest.raises(PolicyError, match="4 heads of head_dim=8 need 32"):
        _plan(model, RankLayout(1, 0))


def test_unfused_column_is_cut_evenly() -> None:
    plan = _plan(_model(), RankLayout(1, 0), (*_rows_without("lm_head"), StyleRow("lm_head", Column())))
    assert next(p for p in plan.parameters if p.name == "lm_head.weight").shape == (23, 16)


@pytest.mark.parametrize(
    ("tp_size", "said"), [(3, "num_attention_heads=4"), (8, "num_attention_heads=4"), (5, "num_attention_heads=4")]
)
def test_impossible_tp_size_lists_the_possible_ones(tp_size: int, said: str) -> None:
    facts = LlamaPolicy().facts(_model().config)
    with pytest.raises(TensorParallelSizeError, match=said) as caught:
        LlamaPolicy().check_tp_size(facts, tp_size)
    assert "1, 2, 4" in caught.value.remedy


def test_tp_size_must_suit_key_value_heads_and_mlp() -> None:
    policy = LlamaPolicy()
    facts = policy.facts(_model(num_attention_heads=12, hidden_size=48, num_key_value_heads=4).config)
    assert "num_key_value_heads=4" in (policy.tp_size_problem(facts, 3) or "")
    assert "intermediate_size=10" in (
        policy.tp_size_problem(LlamaPolicy().facts(_model(intermediate_size=10).config), 4) or ""
    )


def test_supported_architectures_have_a_policy() -> None:
    assert isinstance(policy_for(supported_architectures()[0]), LlamaPolicy)


def test_unknown_architecture_lists_the_known() -> None:
    with pytest.raises(PolicyError, match="supported: LlamaForCausalLM"):
        policy_for("GPT2LMHeadModel")


def test_every_name_and_shape_problem_is_told_at_once() -> None:
    expected = {"a": TensorInfo((2, 2), "F32"), "b": TensorInfo((3,), "F32"), "tied": TensorInfo((1,), "F32")}
    found = {"b": TensorInfo((4,), "F32"), "c": TensorInfo((1,), "F32")}
    with pytest.raises(CheckpointError) as caught:
        check_names(expected, found, optional={"tied"})
    assert "3 place(s)" in caught.value.message
    for said in ("missing a", "unexpected c", r"b has shape [4], the model needs [3]"):
        assert said in caught.value.message


def test_long_lists_of_problems_are_cut() -> None:
    expected = {f"p{i}": TensorInfo((1,), "F32") for i in range(20)}
    with pytest.raises(CheckpointError, match=r"and 8 more"):
        check_names(expected, {}, optional=set())


def test_quantised_checkpoints_are_refused_by_name() -> None:
    config = _model().config
    config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(CheckpointError, match=r"quantised \(gptq\)"):
        LlamaPolicy().facts(config)


def test_contradicting_head_counts_are_refused() -> None:
    config = _model().config
    config.num_key_value_heads = 3
    with pytest.raises(CheckpointError, match="not a multiple of num_key_value_heads=3"):
        LlamaPolicy().facts(config)


def test_facts_of_a_model() -> None:
    facts = LlamaPolicy().facts(_model(eos_token_id=[2, 5]).config)
    assert isinstance(facts, ModelFacts)
    assert (facts.head_dim, facts.total_num_kv_heads, facts.eos_token_ids) == (4, 2, (2, 5))


def test_a_row_cannot_keep_a_module_that_is_not_there() -> None:
    entry = replicate("model.extra")
    module = ModulePlan("model.extra", "model.extra", "replicate", ())
    with pytest.raises(PolicyError, match=r"'model\.extra' keeps model\.extra, but no module stands there"):
        entry.build(module, None, None)
