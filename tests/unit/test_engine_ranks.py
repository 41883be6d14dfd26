"""Several ranks as threads: the same outputs everywhere, followers, and calls that differ."""

from __future__ import annotations

import gc
from types import SimpleNamespace

import numpy as np
import pytest

from inference_shardformer.engine.engine import InferenceEngine
from inference_shardformer.engine.events import (
    AbandonRequest,
    AbortRequest,
    AddRequest,
    EventExchange,
    UpdateConfig,
    decode_events,
    encode_events,
)
from inference_shardformer.engine.sampling_params import SamplingParams
from inference_shardformer.errors import EnvironmentMismatchError, StateError


def _add(name: str, **settings: object) -> AddRequest:
    return AddRequest(name, 2, "té\ud800\n", (1, 2, 3), SamplingParams(**settings))


def _engine(tiny: SimpleNamespace, group: object, **settings: object) -> InferenceEngine:
    return tiny.Setup(**settings).engine(group, tiny.NullGuard())


def test_events_survive_the_wire() -> None:
    events = [
        _add("a", stop=["x", "é"], stop_token_ids=[5], temperature=0.1, seed=2**63 - 1),
        _add("n", top_k=np.int32(4), top_p=np.float32(0.5), ignore_eos=True, repetition_penalty=2),
        AbortRequest("b"),
        AbandonRequest("c"),
        UpdateConfig('{"inference.scheduler.max_num_seqs":3}', "té"),
    ]
    assert decode_events(encode_events(events)) == events
    assert encode_events(events) == encode_events(decode_events(encode_events(events)))


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_give_what_one_rank_gives(tiny: SimpleNamespace, size: int) -> None:
    prompts = [*tiny.ragged_prompts(9), "text"]
    params = [SamplingParams(temperature=i % 3 / 2, seed=i, stop="q") for i in range(10)]
    expected = tiny.Setup(num_blocks=16).engine().generate(prompts, params)

    def program(group: object) -> list:
        engine = _engine(tiny, group, num_blocks=16)
        outputs = engine.generate(prompts, params)
        tiny.assert_all_free(engine)
        return outputs

    assert tiny.run_ranks(size, program) == [expected] * size


def test_follower_only_steps(tiny: SimpleNamespace) -> None:
    def program(group: object) -> list:
        engine = _engine(tiny, group)
        if group.rank == 0:
            engine.add_request("ab", request_id="x")
            engine.add_request([5, 6])
        outputs = []
        for step in range(20):
            if step == 4 and group.rank == 0:
                assert engine.abort("x")
                assert engine.has_unfinished()
            outputs += engine.step()
        tiny.assert_all_free(engine)
        return outputs

    first, second = tiny.run_ranks(2, program)
    assert first == second
    assert [(output.request_id, output.finish_reason) for output in first] == [("x", "abort"), ("request-1", "length")]
    assert len(first[0].token_ids) == 4


def test_stream_may_be_left_on_all_ranks(tiny: SimpleNamespace) -> None:
    def program(group: object) -> list:
        engine = _engine(tiny, group)
        chunks = engine.stream(["ab", "cd"])
        first = [next(chunks), next(chunks)]
        chunks.close()
        outputs = engine.generate([[1]])
        tiny.assert_all_free(engine)
        assert engine.step() == []
        return first + outputs

    first, second = tiny.run_ranks(2, program)
    assert first == second
    assert list(first[2].token_ids) == tiny.Setup().greedy([1], 16)


@pytest.mark.parametrize("early", [0, 1])
def test_ranks_may_leave_a_stream_at_different_steps(tiny: SimpleNamespace, early: int) -> None:
    """As the garbage collector does, which runs when it pleases."""

    def program(group: object) -> list:
        engine = _engine(tiny, group)
        chunks = engine.stream(["ab", "cd"])
        next(chunks)
        for rank in (early, 1 - early):
            if group.rank == rank:
                chunks.close()
            engine.step()
        outputs = engine.generate([[1]])
        tiny.assert_all_free(engine)
        return outputs

    first, second = tiny.run_ranks(2, program)
    assert first == second
    assert list(first[0].token_ids) == tiny.Setup().greedy([1], 16)


def test_stream_lost_in_a_cycle_is_left_on_all_ranks(tiny: SimpleNamespace) -> None:
    """Whichever thread collects it: it closes the streams of both ranks in the middle of a step."""

    def program(group: object) -> list:
        engine = _engine(tiny, group)
        model, lost = engine._runner._model, [engine.stream(["ab", "cd"])]
        next(lost[0])
        lost.append(lost)
        del lost

        def collecting(**arguments: object) -> object:
            if group.rank == 1:
                engine._runner._model = model
                gc.collect()
            return model(**arguments)

        engine._runner._model = collecting
        outputs = engine.generate([[1]])
        engine.step()
        tiny.assert_all_free(engine)
        return outputs

    gc.disable()
    try:
        first, second = tiny.run_ranks(2, program)
    finally:
        gc.enable()
    assert first == second
    assert list(first[0].token_ids) == tiny.Setup().greedy([1], 16)


def test_a_callback_that_raises_on_rank_0_alone_ends_the_call_on_all(tiny: SimpleNamespace) -> None:
    def program(group: object) -> list:
        engine = _engine(tiny, group, max_num_seqs=1)
        num_steps = 0

        def on_step(stats: object) -> None:
            nonlocal num_steps
            num_steps += 1
            if num_steps == 3:
                raise ValueError("a progress bar that only rank 0 shows")

        outputs = []
        try:
            outputs += engine.generate([[1], [2]], on_step=on_step if group.rank == 0 else None)
        except ValueError:
            outputs += engine.step()
        outputs += engine.generate([[3]])
        tiny.assert_all_free(engine)
        return outputs

    first, second = tiny.run_ranks(2, program)
    greedy = tiny.Setup().greedy
    assert [list(output.token_ids) for output in first] == [greedy([3], 16)]
    assert [list(output.token_ids) for output in second] == [greedy([1], 16)[:3], [], greedy([3], 16)]
    assert [output.finish_reason for output in second] == ["abort", "abort", "length"]


def test_different_calls_fail_on_every_rank_by_name(tiny: SimpleNamespace) -> None:
    def differing(group: object) -> None:
        engine = _engine(tiny, group)
        try:
            engine.generate([[1, 7 if group.rank == 2 else 5]])
        except EnvironmentMismatchError:
            with pytest.raises(StateError, match=r"step\(\) on an engine that is failed"):
                engine.step()
            engine.close()
            raise

    results = tiny.run_ranks(3, differing)
    assert all(isinstance(result, EnvironmentMismatchError) for result in results)
    assert {result.message for result in results} == {
        "ranks [2] added or aborted other requests than rank 0 before this step"
    }


def test_calls_where_rank_0_made_none_fail_there(tiny: SimpleNamespace) -> None:
    def program(group: object) -> list:
        exchange = EventExchange(group)
        if group.rank == 1:
            exchange.post(_add("a"))
        return exchange.receive().agreed()

    first, second = tiny.run_ranks(2, program)
    assert first == []
    assert isinstance(second, EnvironmentMismatchError)
    assert "[1]" in second.message


def test_exchange_keeps_order_and_forgets(tiny: SimpleNamespace) -> None:
    exchange = EventExchange(SimpleNamespace(rank=0, size=1))
    for event in (_add("a"), _add("b"), AbandonRequest("b"), AbortRequest("a")):
        exchange.post(event)
    assert exchange.num_pending_adds == 2
    exchange.forget({"b"})
    assert exchange.adds("a")
    assert not exchange.adds("b")
    assert exchange.receive().agreed() == [_add("a"), AbortRequest("a")]
    assert not exchange.has_pending
    assert not exchange.adds("a")
