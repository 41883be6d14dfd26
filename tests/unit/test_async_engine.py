"""AsyncEngine: many tasks on one engine get what each would get alone; cancelling, errors and failures."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Awaitable, Callable
from types import SimpleNamespace

import pytest

from inference_shardformer import AsyncEngine
from inference_shardformer.engine.engine import InferenceEngine
from inference_shardformer.engine.outputs import StepStats
from inference_shardformer.engine.sampling_params import SamplingParams
from inference_shardformer.errors import QueueFullError, RankFailure, RequestError, StateError

SOON_S = 20.0


def run(engine: InferenceEngine, use: Callable[[AsyncEngine], Awaitable[object]], **options: object) -> object:
    """What `use` makes of a running AsyncEngine."""

    async def main() -> object:
        async with AsyncEngine(engine, **options) as async_engine:
            return await use(async_engine)

    return asyncio.run(asyncio.wait_for(main(), SOON_S))


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


async def read(engine: AsyncEngine, prompt: object, params: SamplingParams | None = None) -> tuple[str, list[int], str]:
    text, token_ids, reason = "", [], None
    async for chunk in engine.generate(prompt, params):
        assert reason is None
        text, reason = text + chunk.text, chunk.finish_reason
        token_ids += chunk.token_ids
    return text, token_ids, reason


@pytest.mark.parametrize("overlap", ["off", "on"])
def test_tasks_get_what_one_call_gives(tiny: SimpleNamespace, overlap: str) -> None:
    prompts = ["text", *tiny.ragged_prompts(14)]
    params = [SamplingParams(temperature=i % 3 / 2, seed=i, max_new_tokens=1 + i, stop="q") for i in range(15)]
    expected = tiny.Setup().engine().generate(prompts, params)
    engine = tiny.Setup(num_blocks=24, overlap=overlap).engine()
    seen: list[StepStats] = []

    async def use(async_engine: AsyncEngine) -> list:
        return await asyncio.gather(*map(lambda p, s: read(async_engine, p, s), prompts, params))

    results = run(engine, use, on_step=seen.append)
    assert results == [(output.text, list(output.token_ids), output.finish_reason) for output in expected]
    assert max(stats.num_running for stats in seen) > 4
    tiny.assert_all_free(engine)


async def _closed(async_engine: AsyncEngine) -> None:
    stream = async_engine.generate([1, 2], SamplingParams(max_new_tokens=100))
    await anext(stream)
    stream.close()


async def _left(async_engine: AsyncEngine) -> None:
    async with async_engine.generate([1, 2], SamplingParams(max_new_tokens=100)) as stream:
        await anext(stream)


async def _let_go(async_engine: AsyncEngine) -> None:
    stream = async_engine.generate([1, 2], SamplingParams(max_new_tokens=100))
    await anext(stream)
    del stream
    gc.collect()


async def _never_read(async_engine: AsyncEngine) -> None:
    async_engine.generate([1, 2], SamplingParams(max_new_tokens=100)).close()


async def _cancelled(async_engine: AsyncEngine) -> None:
    task = asyncio.ensure_future(read(async_engine, [1, 2], SamplingParams(max_new_tokens=100)))
    await asyncio.sleep(0)  # the task runs until it waits for a chunk
    assert async_engine.num_unfinished >= 1
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("leave", [_closed, _left, _let_go, _never_read, _cancelled])
def test_a_request_that_nobody_reads_is_aborted(tiny: SimpleNamespace, leave: Callable) -> None:
    engine = tiny.Setup(alphabet=range(97, 123)).engine()
    other = tiny.Setup(alphabet=range(97, 123)).greedy([5, 6], 16)
    num_calls = []

    async def use(async_engine: AsyncEngine) -> object:
        reading = asyncio.ensure_future(read(async_engine, [5, 6]))
        await leave(async_engine)
        _, token_ids, _ = await reading
        await until(lambda: async_engine.num_unfinished == 0)
        num_calls.append(engine._runner._model.num_calls)
        return token_ids

    assert run(engine, use) == other
    assert num_calls[0] < 60  # the aborted request would have taken 100 steps
    tiny.assert_all_free(engine)


def test_an_invalid_request_ends_alone(tiny: SimpleNamespace) -> None:
    engine = tiny.Setup(poison=7).engine()

    async def use(async_engine: AsyncEngine) -> list:
        wanted = [[5, 6], [999], [1] * 200, [], [3, 7], 5]
        return await asyncio.gather(*(read(async_engine, prompt) for prompt in wanted), return_exceptions=True)

    good, *bad = run(engine, use)
    assert good[1] == tiny.Setup().greedy([5, 6], 16)
    assert [type(error) for error in bad] == [RequestError] * 5
    assert "not finite" in bad[3].message
    tiny.assert_all_free(engine)


def test_validation_before_queueing_tells_the_same(tiny: SimpleNamespace) -> None:
    async def use(async_engine: AsyncEngine) -> None:
        assert await async_engine.validate("ab") == (97, 98)
        with pytest.raises(RequestError, match="999"):
            await async_engine.validate([999])
        with pytest.raises(RequestError, match="max_model_len"):
            await async_engine.validate([1], SamplingParams(max_new_tokens=1000))

    run(tiny.Setup().engine(), use)


def test_a_full_queue_refuses_by_name_and_empties_again(tiny: SimpleNamespace) -> None:
    async def use(async_engine: AsyncEngine) -> None:
        streams = [async_engine.generate([1], SamplingParams(max_new_tokens=50)) for _ in range(3)]
        with pytest.raises(
            QueueFullError, match="1 more than the 3 requests that wait and run now, and no more than 3 may"
        ):
            async_engine.generate([1])
        streams[0].close()
        await until(lambda: async_engine.num_unfinished == 2)
        async_engine.check_room(1)
        with pytest.raises(QueueFullError, match="2 more than the 2"):
            async_engine.check_room(2)
        for stream in streams:
            stream.close()
        await until(lambda: async_engine.num_unfinished == 0)
        assert len((await read(async_engine, [1]))[1]) == 16

    run(tiny.Setup(max_num_seqs=2).engine(), use, max_queue=1)


def test_a_request_id_in_use_is_refused(tiny: SimpleNamespace) -> None:
    async def use(async_engine: AsyncEngine) -> None:
        first = async_engine.generate([1], SamplingParams(max_new_tokens=90), request_id="a")
        assert (await anext(first)).request_id == "a"
        with pytest.raises(RequestError, match="'a'"):
            await anext(async_engine.generate([1], request_id="a"))
        assert (await anext(first)).finish_reason is None

    run(tiny.Setup().engine(), use)


def test_a_failure_is_the_same_for_all_and_stays(tiny: SimpleNamespace) -> None:
    engine = tiny.Setup(fail_at=6).engine()

    async def use() -> None:
        async_engine = AsyncEngine(engine)
        await async_engine.start()
        errors = await asyncio.gather(*(read(async_engine, [i]) for i in range(4)), return_exceptions=True)
        assert {type(error) for error in errors} == {RankFailure}
        assert {error.message for error in errors} == {"rank 0 failed during serving: RuntimeError: the model broke"}
        assert (await async_engine.wait_ended()).message == errors[0].message
        assert async_engine.num_unfinished == 0
        for call in (lambda: async_engine.generate([1]), async_engine.stop):
            with pytest.raises(RankFailure, match="the model broke"):
                await call()
        assert not async_engine.is_accepting

    asyncio.run(asyncio.wait_for(use(), SOON_S))


def test_illegal_calls_name_the_state(tiny: SimpleNamespace) -> None:
    async def use() -> None:
        async_engine = AsyncEngine(tiny.Setup().engine())
        await async_engine.stop()  # nothing to stop
        with pytest.raises(StateError, match="not started"):
            async_engine.generate([1])
        await async_engine.start()
        with pytest.raises(StateError, match="has been started"):
            await async_engine.start()
        await async_engine.stop()
        await async_engine.stop()
        with pytest.raises(StateError, match="that stops"):
            async_engine.generate([1])

    asyncio.run(asyncio.wait_for(use(), SOON_S))


def test_draining_lets_requests_finish_within_the_grace_and_aborts_the_rest(tiny: SimpleNamespace) -> None:
    engine = tiny.Setup(max_model_len=4000, num_blocks=2000, max_new_tokens=8).engine()

    async def use(async_engine: AsyncEngine) -> None:
        quick = async_engine.generate([1])
        await async_engine.drain(SOON_S)
        assert async_engine.num_unfinished == 0
        assert [chunk.finish_reason async for chunk in quick] == [None] * 7 + ["length"]

    run(engine, use)
    engine = tiny.Setup(max_model_len=4000, num_blocks=2000).engine()

    async def use_long(async_engine: AsyncEngine) -> None:
        long = async_engine.generate([1], SamplingParams(max_new_tokens=3000))
        assert (await anext(long)).finish_reason is None
        await async_engine.drain(0.0)
        *_, last = [chunk async for chunk in long]
        assert last.finish_reason == "abort"
        assert async_engine.num_unfinished == 0

    run(engine, use_long)
    tiny.assert_all_free(engine)


def test_ranks_follow_until_they_are_dismissed(tiny: SimpleNamespace) -> None:
    prompts = [[i, 2] for i in range(5)]
    expected = [tiny.Setup().greedy(prompt, 16) for prompt in prompts]

    def program(group: object) -> object:
        engine = tiny.Setup().engine(group, tiny.NullGuard())
        if group.rank:
            with pytest.raises(StateError, match="AsyncEngine on rank 1"):
                AsyncEngine(engine)
            engine.follow()
            tiny.assert_all_free(engine)
            return engine.step()

        async def use(async_engine: AsyncEngine) -> list:
            leaving = async_engine.generate([9, 9], SamplingParams(max_new_tokens=100))
            await anext(leaving)
            leaving.close()
            results = await asyncio.gather(*(read(async_engine, prompt) for prompt in prompts))
            await until(lambda: async_engine.num_unfinished == 0)
            return [token_ids for _, token_ids, _ in results]

        results = run(engine, use)
        with pytest.raises(StateError, match=r"follow\(\) on rank 0"):
            engine.follow()
        assert engine.step() == []
        return results

    first, second = tiny.run_ranks(2, program)
    assert first == expected
    assert second == []


def test_the_engine_serves_other_callers_meanwhile(tiny: SimpleNamespace) -> None:
    engine = tiny.Setup().engine()

    async def use(async_engine: AsyncEngine) -> tuple:
        reading = asyncio.ensure_future(read(async_engine, [1]))
        (other,) = await asyncio.to_thread(engine.generate, [[2]])
        await asyncio.to_thread(engine.update_config, {"sampling.max_new_tokens": 3})
        return (await reading)[1], list(other.token_ids), (await read(async_engine, [1]))[1]

    oracle = tiny.Setup()
    assert run(engine, use) == (oracle.greedy([1], 16), oracle.greedy([2], 16), oracle.greedy([1], 3))
