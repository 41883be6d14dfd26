"""Unsharding: the Hugging Face model comes back bit for bit, from memory and from a checkpoint, and after failures."""

from __future__ import annotations

import weakref

import pytest
import torch
from reversing import portrait
from tiny_models import hf_greedy, save_tiny_model, tiny_model
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention

from inference_shardformer import ConfigSources, InferenceConfig, InferenceShardformer, SamplingParams
from inference_shardformer.errors import CheckpointError, InferenceShardformerError, StateError
from inference_shardformer.layers.embedding import ParallelLMHead, VocabParallelEmbedding
from inference_shardformer.layers.linear import ColumnParallelLinear, GateUpParallelLinear, RowParallelLinear
from inference_shardformer.policies.llama import LlamaPolicy
from inference_shardformer.sharding import weights
from inference_shardformer.sharding.snapshot import ModelSnapshot
from inference_shardformer.simulation import simulate

PARALLEL = (ColumnParallelLinear, GateUpParallelLinear, ParallelLMHead, RowParallelLinear, VocabParallelEmbedding)
CASES = ["gqa", "tied", "biased", "gqa_fewer_kv_heads_than_ranks", "odd_vocabulary", "odd_vocabulary_tied", "mqa"]
PROMPT = [3, 14, 15, 9, 2]
CPU = ConfigSources(environ={})


def shardformer(rank=None, **inference) -> InferenceShardformer:
    make = InferenceShardformer if rank is None else rank.shardformer
    return make(None, InferenceConfig(**inference), sources=CPU)


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("case", CASES)
def test_in_memory(case, tp_size):
    before, expected = portrait(tiny_model(case)), hf_greedy(tiny_model(case), PROMPT, 6)

    def program(rank):
        model = tiny_model(case)
        objects = dict(model.named_parameters())
        with shardformer(rank) as mine:
            sharded, _ = mine.optimize(model)
            assert portrait(sharded)["classes"] != before["classes"]
            assert mine.unshard(sharded) is model
            assert all(objects[name] is parameter for name, parameter in model.named_parameters())
        return portrait(model), hf_greedy(model, PROMPT, 6)

    for after, tokens in simulate(tp_size, program):
        assert after == before
        assert tokens == expected


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("case", ["gqa", "odd_vocabulary_tied", "rope_yarn"])
def test_from_a_checkpoint(case, tp_size, tmp_path):
    save_tiny_model(case, tmp_path)
    reference = LlamaForCausalLM.from_pretrained(tmp_path)
    before, expected = portrait(reference), hf_greedy(reference, PROMPT, 6)

    def program(rank):
        with shardformer(rank) as mine:
            model = mine.unshard(mine.from_pretrained(tmp_path))
        return portrait(model), hf_greedy(model, PROMPT, 6)

    for after, tokens in simulate(tp_size, program):
        assert {**after, "config": None} == {**before, "config": None}
        assert after["config"]["attention"] == before["config"]["attention"]
        assert tokens == expected


def test_rank_0_alone():
    before = portrait(tiny_model("gqa"))

    def program(rank):
        model = tiny_model("gqa")
        with shardformer(rank) as mine:
            mine.optimize(model)
            mine.unshard(model, everywhere=False)
        return model

    first, second = simulate(2, program)
    assert portrait(first) == before
    assert all(parameter.is_meta for parameter in second.parameters())


def test_hooks_of_before_and_of_meanwhile_are_kept():
    model = tiny_model("gqa")
    calls: list[str] = []
    model.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append("before"))
    with shardformer() as mine:
        mine.optimize(model)
        model.model.register_forward_hook(lambda *_: calls.append("meanwhile"))
        mine.unshard(model)
    model(torch.tensor([PROMPT]))
    assert calls == ["before", "meanwhile"]


@pytest.mark.parametrize("tp_size", [1, 2])
def test_a_context_ends_with_the_model(tp_size):
    before = portrait(tiny_model("tied"))

    def program(rank):
        model = tiny_model("tied")
        with shardformer(rank) as mine:
            with mine.sharded_model(model) as sharded:
                assert portrait(sharded) != before
                mine.attach(sharded).generate([PROMPT], SamplingParams(max_new_tokens=2))
            return portrait(model)

    assert simulate(tp_size, program) == [before] * tp_size


def test_a_context_that_fails_ends_with_the_model():
    model = tiny_model("tied")
    before = portrait(model)
    with shardformer() as mine:
        with pytest.raises(ZeroDivisionError), mine.sharded_model(model) as sharded:
            mine.attach(sharded).generate([PROMPT], on_step=lambda _: 1 // 0)
        assert portrait(model) == before


@pytest.mark.parametrize("failing_rank", [0, 1])
@pytest.mark.parametrize("after", [0, 1, 5, 100])
def test_sharding_that_ends_half_way_restores_the_model(failing_rank, after, monkeypatch):
    before = portrait(tiny_model("tied"))
    allocate, loaded = weights._allocate, {0: 0, 1: 0}

    def program(rank):
        model = tiny_model("tied")
        mine = shardformer(rank)
        try:
            with pytest.raises(InferenceShardformerError, match="no memory"):
                mine.optimize(model)
        finally:
            mine.close()
        return portrait(model)

    def failing(target, parameter, dtype, device):
        import threading

        rank = seats.setdefault(threading.get_ident(), len(seats))
        loaded[rank] += 1
        if rank == failing_rank and loaded[rank] == min(after, 12) + 1:
            raise MemoryError("no memory")
        return allocate(target, parameter, dtype, device)

    seats: dict[int, int] = {}
    monkeypatch.setattr(weights, "_allocate", failing)
    assert simulate(2, program) == [before, before]


def test_a_narrower_type_is_refused_before_anything_changes():
    model = tiny_model("gqa")
    before = portrait(model)
    with shardformer(dtype="bf16") as mine:
        with pytest.raises(StateError, match="are float32, and were computed in bfloat16"), mine.sharded_model(model):
            pass
        assert portrait(model) == before
    with shardformer(dtype="bf16") as mine:
        mine.optimize(model)
        with pytest.raises(StateError, match="original values are gone"):
            mine.unshard(model)


def test_a_wider_type_comes_back():
    model = tiny_model("gqa").bfloat16()
    before = portrait(model)
    with shardformer(dtype="fp32") as mine:
        mine.optimize(model)
        assert next(model.parameters()).dtype == torch.float32
        mine.unshard(model)
    assert portrait(model) == before


def test_copies_that_differ_are_named():
    def program(rank):
        model = tiny_model("gqa")
        with shardformer(rank) as mine:
            mine.optimize(model)
            if rank.tp_rank == 1:
                model.model.norm.weight.data[3] += 1
            with pytest.raises(CheckpointError, match=r"1 copies of weights differ .*rank 1: model.norm.weight"):
                mine.unshard(model)

    simulate(2, program)


def test_calls_that_are_not_possible():
    with shardformer() as mine:
        with pytest.raises(StateError, match="unshard"):
            mine.unshard(tiny_model("gqa"))
        model, _ = mine.optimize(tiny_model("gqa"))
        with pytest.raises(StateError, match="another LlamaForCausalLM"):
            mine.unshard(tiny_model("gqa"))
        mine.unshard(model)
        with pytest.raises(StateError, match="'restored'"):
            mine.attach(model)


class Own(LlamaAttention):
    """A user's attention, left as it is."""

    def forward(self, *args, attn_metadata=None, **kwargs):
        return super().forward(*args, **kwargs)


def test_modules_that_were_left_out_come_back_too():
    model = tiny_model("gqa")
    for layer_idx, layer in enumerate(model.model.layers):
        own = Own(model.config, layer_idx)
        own.load_state_dict(layer.self_attn.state_dict())
        layer.self_attn = own
    model.eval()
    before = portrait(model)
    with shardformer() as mine:
        mine.optimize(model, LlamaPolicy().leaving_out(Own))
        mine.unshard(model)
    assert portrait(model) == before


def test_parts_are_let_go_as_they_are_gathered(monkeypatch):
    model = tiny_model("gqa")
    total = sum(parameter.nbytes for parameter in model.parameters())
    largest = max(parameter.nbytes for parameter in model.parameters())
    held: list[int] = []
    assign = ModelSnapshot.assign

    def counting(self, name, value, *, dtype=None):
        alive = [part for reference in parts if (part := reference()) is not None]
        held.append(sum(each.nbytes for part in alive for each in part.parameters(recurse=False)))
        assign(self, name, value, dtype=dtype)
        held[-1] += sum(parameter.nbytes for parameter in model.parameters())

    with shardformer() as mine:
        mine.optimize(model)
        parts = [weakref.ref(module) for module in model.modules() if isinstance(module, PARALLEL)]
        monkeypatch.setattr(ModelSnapshot, "assign", counting)
        mine.unshard(model)
    assert held[-1] == total
    assert max(held) < total + 3 * largest
