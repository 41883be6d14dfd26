"""New weights for a running engine: on all ranks between two steps, in place, as a whole or not at all."""

from __future__ import annotations

import pytest
import torch
from reversing import digest
from tiny_models import hf_greedy, tiny_model

from inference_shardformer import ConfigSources, InferenceConfig, InferenceShardformer, SamplingParams
from inference_shardformer.errors import CheckpointError, RankFailure, StateError
from inference_shardformer.simulation import simulate

PROMPT = [3, 14, 15, 9, 2]
CPU = ConfigSources(environ={})
CASES = ["gqa", "tied", "biased", "gqa_fewer_kv_heads_than_ranks", "odd_vocabulary_tied"]


def shardformer(rank=None, **inference) -> InferenceShardformer:
    make = InferenceShardformer if rank is None else rank.shardformer
    return make(None, InferenceConfig(**inference), sources=CPU)


def others(case: str) -> dict[str, torch.Tensor]:
    """The weights of another model of the same shape."""
    return tiny_model(case, seed=7).state_dict()


def weights_of(mine: InferenceShardformer, model: torch.nn.Module, folder) -> dict[str, str]:
    """What the ranks hold now, gathered."""
    from safetensors.torch import load_file

    mine.save_pretrained(model, folder)
    return digest(load_file(folder / "model.safetensors"))


def expected(case: str) -> dict[str, str]:
    tied = {"lm_head.weight"} if "tied" in case else set()
    return digest({name: tensor for name, tensor in others(case).items() if name not in tied})


@pytest.mark.parametrize("how", ["mapping", "iterator"])
@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("case", CASES)
def test_every_rank_brings_them(case, tp_size, how, tmp_path):
    def program(rank):
        with shardformer(rank) as mine:
            model, _ = mine.optimize(tiny_model(case))
            engine = mine.attach(model)
            addresses = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
            given = others(case)
            count = engine.update_weights(given if how == "mapping" else iter(given.items()))
            assert addresses == {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
            return count, weights_of(mine, model, tmp_path)

    for count, held in simulate(tp_size, program):
        assert held == expected(case)
        assert count == len(held)


def test_the_next_tokens_are_those_of_the_new_weights():
    with shardformer() as mine:
        model, _ = mine.optimize(tiny_model("tied"))
        engine = mine.attach(model)
        old = engine.generate([PROMPT], SamplingParams(max_new_tokens=6))[0].token_ids
        engine.update_weights(others("tied"))
        new = engine.generate([PROMPT], SamplingParams(max_new_tokens=6))[0].token_ids
    assert list(old) == hf_greedy(tiny_model("tied"), PROMPT, 6)
    assert list(new) == hf_greedy(tiny_model("tied", seed=7), PROMPT, 6)


@pytest.mark.parametrize("case", ["gqa", "tied"])
def test_weights_that_are_compressed_are_exchanged_in_place(case):
    def tokens(engine):
        return engine.generate([PROMPT], SamplingParams(max_new_tokens=12, ignore_eos=True))[0].token_ids

    with shardformer(dtype="bf16") as fresh:
        expected_tokens = tokens(fresh.attach(fresh.optimize(tiny_model(case, seed=7).bfloat16())[0]))
    with shardformer(dtype="bf16") as mine:
        engine = mine.attach(mine.optimize(tiny_model(case).bfloat16())[0])
        old = tokens(engine)
        engine.update_weights({name: tensor.bfloat16() for name, tensor in others(case).items()})
        assert tokens(engine) == expected_tokens != old


@pytest.mark.parametrize("how", ["mapping", "iterator"])
def test_rank_0_alone_brings_them_and_the_others_step(how, tmp_path):
    def program(rank):
        with shardformer(rank) as mine:
            model, _ = mine.optimize(tiny_model("gqa"))
            engine = mine.attach(model)
            if rank.tp_rank == 0:
                engine.update_weights(others("gqa") if how == "mapping" else iter(others("gqa").items()))
            else:
                engine.step()
            return weights_of(mine, model, tmp_path)

    assert simulate(2, program) == [expected("gqa")] * 2


def test_with_live_requests_both_ranks_go_on():
    def program(rank):
        with shardformer(rank) as mine:
            model, _ = mine.optimize(tiny_model("gqa"))
            engine = mine.attach(model)
            engine.add_request(PROMPT, SamplingParams(max_new_tokens=8), request_id="a")
            engine.step()
            engine.update_weights(others("gqa"))
            outputs = []
            while engine.has_unfinished():
                outputs += engine.step()
            return [list(output.token_ids) for output in outputs]

    first, second = simulate(2, program)
    assert first == second
    assert len(first[0]) == 8


def test_some_of_them_are_enough(tmp_path):
    name = "model.layers.1.self_attn.k_proj.weight"
    with shardformer() as mine:
        model, _ = mine.optimize(tiny_model("gqa"))
        assert mine.attach(model).update_weights({name: others("gqa")[name]}) == 1
        held = weights_of(mine, model, tmp_path)
    before = digest(tiny_model("gqa").state_dict())
    assert {each for each in before if held[each] != before[each]} == {name}
    assert held[name] == expected("gqa")[name]


def test_new_weights_are_saved_in_the_compute_type(tmp_path):
    from safetensors.torch import load_file

    with shardformer(dtype="fp32") as mine:
        model, _ = mine.optimize(tiny_model("gqa").bfloat16())
        mine.attach(model).update_weights(others("gqa"))
        mine.save_pretrained(model, tmp_path)
    assert digest(load_file(tmp_path / "model.safetensors")) == expected("gqa")


NORM = "model.norm.weight"
WRONG = [
    ({"model.nrm.weight": torch.ones(64)}, "model.nrm.weight is no weight of this model; did you mean model.norm"),
    ({NORM: torch.ones(63)}, r"has shape \[63\], the model's has \[64\]"),
    ({NORM: torch.ones(64, dtype=torch.int64)}, "int64, which is not a floating-point type"),
    ({NORM: [1.0] * 64}, "is a list, not a tensor"),
    ({NORM: torch.ones(64, device="meta")}, "has no values"),
]


@pytest.mark.parametrize(("wrong", "said"), WRONG, ids=["name", "shape", "type", "list", "meta"])
@pytest.mark.parametrize("tp_size", [1, 2])
def test_a_mapping_is_checked_as_a_whole(wrong, said, tp_size, tmp_path):
    def program(rank):
        with shardformer(rank) as mine:
            model, _ = mine.optimize(tiny_model("gqa"))
            engine = mine.attach(model)
            with pytest.raises(CheckpointError, match=said):
                engine.update_weights({"lm_head.weight": torch.zeros(160, 64), **wrong})
            engine.generate([PROMPT], SamplingParams(max_new_tokens=2))
            return weights_of(mine, model, tmp_path)

    assert simulate(tp_size, program) == [digest(tiny_model("gqa").state_dict())] * tp_size


def test_tied_weights_must_agree():
    given = others("tied")
    given["lm_head.weight"] = given["lm_head.weight"] + 1
    with shardformer() as mine:
        model, _ = mine.optimize(tiny_model("tied"))
        engine = mine.attach(model)
        with pytest.raises(CheckpointError, match="they were given different values"):
            engine.update_weights(given)


def test_tied_weights_that_come_apart_must_agree_too():
    given = others("tied")
    with shardformer() as mine:
        model, _ = mine.optimize(tiny_model("tied"))
        engine = mine.attach(model)
        assert engine.update_weights(iter(given.items())) == len(given) - 1
        given["lm_head.weight"] = given["lm_head.weight"] + 1
        with pytest.raises(RankFailure, match="tied to it, with other values"):
            engine.update_weights(iter(given.items()))


@pytest.mark.parametrize("tp_size", [1, 2])
def test_an_iterator_that_fails_first_changes_nothing(tp_size):
    def items():
        yield from ()
        raise OSError("the trainer has gone")

    def program(rank):
        with shardformer(rank) as mine:
            model, _ = mine.optimize(tiny_model("gqa"))
            engine = mine.attach(model)
            with pytest.raises(CheckpointError, match="OSError: the trainer has gone"):
                engine.update_weights(items() if rank.tp_rank == tp_size - 1 else iter(others("gqa").items()))
            return engine.generate([PROMPT], SamplingParams(max_new_tokens=2))[0].finish_reason

    assert simulate(tp_size, program) == ["length"] * tp_size


@pytest.mark.parametrize("tp_size", [1, 2])
def test_an_iterator_that_fails_later_ends_the_engine_by_name(tp_size):
    def items(rank):
        given = list(others("gqa").items())
        yield from given[:3]
        if rank == tp_size - 1:
            raise OSError("the trainer has gone")
        yield from given[3:]

    def program(rank):
        with shardformer(rank) as mine:
            model, _ = mine.optimize(tiny_model("gqa"))
            engine = mine.attach(model)
            with pytest.raises(RankFailure, match="the trainer has gone") as caught:
                engine.update_weights(items(rank.tp_rank))
            with pytest.raises(StateError, match="is failed"):
                engine.update_weights({})
            return caught.value.rank, caught.value.phase

    assert simulate(tp_size, program) == [(tp_size - 1, "weight update")] * tp_size


def test_ranks_that_bring_different_things_are_told():
    def program(rank):
        with shardformer(rank) as mine:
            model, _ = mine.optimize(tiny_model("gqa"))
            engine = mine.attach(model)
            given = dict(list(others("gqa").items())[rank.tp_rank :])
            with pytest.raises(CheckpointError, match="the ranks brought different items"):
                engine.update_weights(given)
            with pytest.raises(CheckpointError, match="the ranks brought mapping, iterator"):
                engine.update_weights(given if rank.tp_rank == 0 else iter(given.items()))

    simulate(2, program)


def test_a_rank_above_0_alone_is_refused():
    def program(rank):
        with shardformer(rank) as mine:
            model, _ = mine.optimize(tiny_model("gqa"))
            engine = mine.attach(model)
            if rank.tp_rank == 0:
                engine.step()
                return
            with pytest.raises(StateError, match="rank 1 asked for new weights, and rank 0 did not"):
                engine.update_weights(others("gqa"))

    simulate(2, program)
