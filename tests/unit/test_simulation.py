"""Simulated ranks: deterministic turns, named deadlocks, failures as those of real ranks, and the real code path."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from tiny_models import hf_greedy, ragged_prompts, save_tiny_model

from inference_shardformer import InferenceConfig, SamplingParams, ShardConfig, simulate
from inference_shardformer.distributed.simulated.errors import DeadlockError
from inference_shardformer.errors import ConfigError, EnvironmentMismatchError, RankFailure, StateError
from inference_shardformer.simulation import SimulatedRank

CONFIG = InferenceConfig.model_validate({"dtype": "fp32", "cache": {"block_size": 4, "num_blocks": 40}})


def joined(rank: SimulatedRank):
    return rank.process_group.join(None)


def test_collectives_do_what_real_ones_do():
    def work(rank: SimulatedRank):
        group, _ = joined(rank)
        t = torch.full((2,), float(rank.tp_rank + 1))
        assert group.all_reduce(t) is t
        gathered = group.all_gather(torch.tensor([[rank.tp_rank]]), dim=0)
        src = group.broadcast(torch.tensor([rank.tp_rank]), src=1)
        said = group.broadcast_bytes(b"hello" if rank.tp_rank == 2 else None, src=2)
        group.barrier()
        names = group.all_gather_bytes(b"x" * rank.tp_rank)
        return t.tolist(), gathered.flatten().tolist(), src.item(), said, names, group.num_collectives

    expected = ([6.0, 6.0], [0, 1, 2], 1, b"hello", [b"", b"x", b"xx"], 8)
    assert simulate(3, work) == [expected] * 3


def test_results_of_one_collective_are_not_shared_between_ranks():
    def work(rank: SimulatedRank):
        group, _ = joined(rank)
        mine = group.all_gather(torch.ones(1))
        mine += rank.tp_rank
        group.barrier()
        return mine.tolist()

    assert simulate(2, work) == [[1.0, 1.0], [2.0, 2.0]]


def test_turns_are_the_same_in_every_run():
    def run() -> list[int]:
        order: list[int] = []

        def work(rank: SimulatedRank) -> None:
            group, _ = joined(rank)
            for _ in range(3):
                order.append(rank.tp_rank)
                group.barrier()

        simulate(3, work)
        return order

    assert run() == run() == [0, 1, 2] * 3


def test_rank_0_is_the_calling_thread_and_no_thread_is_left():
    threads = simulate(3, lambda rank: threading.current_thread())
    assert threads[0] is threading.current_thread()
    assert not any(thread.is_alive() for thread in threads[1:])


def enters_a_sum(group) -> None:
    group.all_reduce(torch.zeros(3))


def enters_a_gather(group) -> None:
    group.all_gather(torch.zeros(3))


def test_different_collectives_become_an_error_with_every_stack():
    def work(rank: SimulatedRank) -> None:
        group, _ = joined(rank)
        (enters_a_gather if rank.tp_rank == 1 else enters_a_sum)(group)

    with pytest.raises(DeadlockError, match="rank 1 is in all_gather of float32") as caught:
        simulate(3, work)
    assert caught.value.rank == 1
    assert "enters_a_gather" in caught.value.stacks[1]
    assert "enters_a_sum" in caught.value.stacks[0]
    assert "enters_a_sum" in caught.value.stacks[2]
    assert "distributed/simulated" not in str(caught.value)


def test_different_shapes_become_an_error():
    def work(rank: SimulatedRank) -> None:
        joined(rank)[0].all_reduce(torch.zeros(3 + rank.tp_rank))

    with pytest.raises(DeadlockError, match=r"rank 0 is in all_reduce of float32 \[3\]; rank 1 .*\[4\]"):
        simulate(2, work)


def test_a_rank_that_ends_while_others_wait_is_named():
    def work(rank: SimulatedRank) -> None:
        group, _ = joined(rank)
        if rank.tp_rank == 0:
            enters_a_sum(group)

    with pytest.raises(DeadlockError, match=r"rank 0 is in all_reduce .*; rank 1 has ended") as caught:
        simulate(2, work)
    assert "enters_a_sum" in caught.value.stacks[0]


def test_a_rank_that_waits_in_another_group_is_found():
    def work(rank: SimulatedRank) -> None:
        first, _ = joined(rank)
        second, _ = joined(rank)
        (second if rank.tp_rank else first).barrier()

    with pytest.raises(DeadlockError):
        simulate(2, work)


def test_the_error_of_the_rank_that_failed_is_the_one_raised():
    def work(rank: SimulatedRank) -> None:
        group, _ = joined(rank)
        if rank.tp_rank == 2:
            raise KeyError("mine")
        group.barrier()

    with pytest.raises(KeyError, match="mine"):
        simulate(3, work)


def test_a_failing_step_fails_every_rank_with_the_same_error():
    errors: dict[int, RankFailure] = {}

    def work(rank: SimulatedRank) -> None:
        group, guard = joined(rank)
        try:
            with guard.step("decode"):
                if rank.tp_rank == 1:
                    raise ValueError("broken")
                group.barrier()
        except RankFailure as exc:
            errors[rank.tp_rank] = exc
        with pytest.raises(RankFailure), guard.step("next"):
            pass

    simulate(2, work)
    assert {(e.rank, e.phase, e.cause) for e in errors.values()} == {(1, "decode", "ValueError: broken")}


def test_the_guard_agrees_and_acts_together():
    def work(rank: SimulatedRank) -> str:
        _, guard = joined(rank)
        guard.agree("compare", {"same": "x"})
        with pytest.raises(EnvironmentMismatchError, match="rank 0 has '0', rank 1 has '1'"):
            guard.agree("compare", {"rank": str(rank.tp_rank)})
        with pytest.raises(ConfigError, match="rank 1: bad"):
            guard.together("load", lambda: _raise(ConfigError("bad")) if rank.tp_rank else 1)
        guard.close()
        with pytest.raises(StateError), guard.step("late"):
            pass
        return guard.together("end", lambda: "never") if False else "done"

    assert simulate(2, work) == ["done", "done"]


def _raise(error: Exception) -> None:
    raise error


def test_closed_groups_and_wrong_sizes_are_refused():
    def closed(rank: SimulatedRank) -> None:
        group, _ = joined(rank)
        group.close()
        group.barrier()

    with pytest.raises(StateError, match="closed"):
        simulate(2, closed)
    with pytest.raises(EnvironmentMismatchError, match="tp_size=4"):
        simulate(2, lambda rank: rank.process_group.join(4))
    with pytest.raises(ConfigError, match="tp_size=0"):
        simulate(0, print)
    with pytest.raises(ConfigError, match="order"):
        simulate(1, print, order="any")  # type: ignore[arg-type]


def test_an_aborted_group_ends_those_that_wait():
    def work(rank: SimulatedRank) -> None:
        group, _ = joined(rank)
        if rank.tp_rank == 1:
            group.abort()
        else:
            with pytest.raises(RankFailure, match="gave its connections up"):
                group.barrier()

    simulate(2, work)


def test_ranks_whose_checkpoints_compute_differently_are_told_in_what(tmp_path: Path):
    """Epsilon and rotary base change no shape and no plan: without a word the result would be nonsense."""
    for name in ("0", "1"):
        save_tiny_model("rope_linear", tmp_path / name)
    file = tmp_path / "1" / "config.json"
    text = file.read_text()
    file.write_text(text.replace("1e-06", "1e-05").replace('"factor": 2.0', '"factor": 4.0'))

    def work(rank: SimulatedRank) -> str:
        with rank.shardformer(ShardConfig(threads_per_rank=1), CONFIG) as shardformer:
            with pytest.raises(EnvironmentMismatchError, match="the ranks disagree during preparation") as caught:
                shardformer.from_pretrained(tmp_path / str(rank.tp_rank))
        return str(caught.value)

    assert text != file.read_text()
    (first, second) = simulate(2, work)
    assert first == second
    assert "config.json rms_norm_eps: rank 0 has '1e-06', rank 1 has '1e-05'" in first
    assert '"factor": 2.0' in first
    assert '"factor": 4.0' in first


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_engines_on_simulated_ranks_equal_hugging_face(tmp_path: Path, tp_size: int):
    native = save_tiny_model("gqa_fewer_kv_heads_than_ranks", tmp_path)
    prompts = ragged_prompts(3, native.config.vocab_size)

    def work(rank: SimulatedRank):
        with rank.shardformer(ShardConfig(threads_per_rank=1), CONFIG) as shardformer:
            engine = shardformer.attach(shardformer.from_pretrained(tmp_path))
            outputs = engine.generate(prompts, SamplingParams(max_new_tokens=6, ignore_eos=True))
            return [list(output.token_ids) for output in outputs]

    expected = [hf_greedy(native, prompt, 6) for prompt in prompts]
    assert simulate(tp_size, work) == [expected] * tp_size
