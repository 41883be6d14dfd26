"""The scheduler simulated without a model: limits, order, preemption, and that everybody finishes."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inference_shardformer.config.inference import SamplingDefaults, SchedulerConfig
from inference_shardformer.engine.request import Request, RequestStatus
from inference_shardformer.engine.request_blocks import RequestBlocks
from inference_shardformer.engine.sampling_params import SamplingParams
from inference_shardformer.engine.scheduler import Scheduler, SchedulerOutput
from inference_shardformer.errors import StateError
from inference_shardformer.kv_cache.block_allocator import BlockAllocator


class _Limited(Scheduler):
    """A scheduler with limits that a test may change between two steps."""

    limits = SchedulerConfig()

    def limit(self, *, seqs: int, tokens: int) -> None:
        self.limits = SchedulerConfig(max_num_seqs=seqs, max_num_batched_tokens=tokens)

    def schedule(self, limits: SchedulerConfig | None = None) -> SchedulerOutput:
        return super().schedule(limits or self.limits)


def _scheduler(num_blocks: int = 8, *, block_size: int = 4, seqs: int = 4, tokens: int = 16) -> _Limited:
    scheduler = _Limited(BlockAllocator(num_blocks), block_size=block_size)
    scheduler.limit(seqs=seqs, tokens=tokens)
    return scheduler


def _request(name: str, num_prompt_tokens: int, max_new_tokens: int = 4) -> Request:
    sampling = SamplingParams(max_new_tokens=max_new_tokens).resolve(SamplingDefaults())
    return Request(name, range(num_prompt_tokens), sampling)


def _apply(scheduler: Scheduler, output: SchedulerOutput) -> None:
    """What the engine does with a step: every request whose tokens are all computed gets one more."""
    for request, num_new_tokens in output.scheduled:
        request.num_computed_tokens += num_new_tokens
        if request.num_uncomputed_tokens == 0:
            request.token_ids.append(0)
            if request.num_output_tokens == request.sampling.max_new_tokens:
                request.finish("length")
                scheduler.finish(request)


def _names(output: SchedulerOutput) -> list[tuple[str, int]]:
    return [(request.request_id, num_new_tokens) for request, num_new_tokens in output.scheduled]


@st.composite
def _workloads(draw: st.DrawFn) -> tuple[dict[str, int], list[tuple[int, int, int]]]:
    """Limits, and requests that fit the cache alone: arrival step, prompt tokens, new tokens."""
    block_size, num_blocks = draw(st.integers(1, 5)), draw(st.integers(1, 12))
    capacity = block_size * num_blocks
    requests = []
    for _ in range(draw(st.integers(1, 12))):
        num_prompt = draw(st.integers(1, capacity))
        num_new = draw(st.integers(1, min(12, capacity + 1 - num_prompt)))
        requests.append((draw(st.integers(0, 20)), num_prompt, num_new))
    limits = {"block_size": block_size, "seqs": draw(st.integers(1, 6)), "tokens": draw(st.integers(1, 20))}
    return {"num_blocks": num_blocks, **limits}, sorted(requests)


def _steps(scheduler: _Limited, requests: list[Request], arrivals: list[int]) -> Iterator[SchedulerOutput]:
    for step in range(5000):
        for request, arrival in zip(requests, arrivals, strict=True):
            if arrival == step:
                scheduler.add(request)
        if step > max(arrivals) and scheduler.num_unfinished == 0:
            return
        output = scheduler.schedule()
        yield output
        _apply(scheduler, output)
        scheduler.check_integrity()
    pytest.fail("requests starve")


@settings(max_examples=150, deadline=None)
@given(_workloads())
def test_any_workload_finishes_within_the_limits(workload: tuple[dict[str, int], list[tuple[int, int, int]]]) -> None:
    limits, wanted = workload
    scheduler = _scheduler(**limits)
    requests = [_request(str(i), num_prompt, num_new) for i, (_, num_prompt, num_new) in enumerate(wanted)]
    for output in _steps(scheduler, requests, [arrival for arrival, _, _ in wanted]):
        assert output.num_tokens <= limits["tokens"]
        assert len(scheduler.running) <= limits["seqs"]
        assert [n == 1 for _, n in output.scheduled] == [True] * output.num_decodes + [False] * (
            len(output.scheduled) - output.num_decodes
        )
        assert output.scheduled or scheduler.num_unfinished == 0
        queue = [*scheduler.running, *scheduler.waiting]
        assert [requests.index(request) for request in queue] == sorted(requests.index(r) for r in queue)
        for request, num_new_tokens in output.scheduled:
            assert 1 <= num_new_tokens <= request.num_uncomputed_tokens
            end = request.num_computed_tokens + num_new_tokens
            assert len(request.block_table) * limits["block_size"] >= end
    assert all(request.is_finished for request in requests)
    assert scheduler.allocator.num_free == limits["num_blocks"]


def test_prompt_is_cut_into_chunks_beside_decodes() -> None:
    scheduler = _scheduler(32, tokens=8)
    scheduler.add(_request("short", 3))
    scheduler.add(_request("long", 18))
    seen = []
    for _ in range(4):
        output = scheduler.schedule()
        seen.append(_names(output))
        _apply(scheduler, output)
    assert seen == [
        [("short", 3), ("long", 5)],
        [("short", 1), ("long", 7)],
        [("short", 1), ("long", 6)],
        [("short", 1), ("long", 1)],
    ]


def test_newest_is_preempted_and_comes_back_first() -> None:
    scheduler = _scheduler(5, block_size=2, tokens=64)
    old, new, later = _request("old", 4, 6), _request("new", 3, 6), _request("later", 1, 1)
    for request in (old, new):
        scheduler.add(request)
    _apply(scheduler, scheduler.schedule())
    scheduler.add(later)
    preempted: list[Request] = []
    while not preempted:
        output = scheduler.schedule()
        preempted = output.preempted
        _apply(scheduler, output)
    assert preempted == [new]
    assert [request.request_id for request in scheduler.waiting][:2] == ["new", "later"]
    assert new.status is RequestStatus.WAITING
    assert new.num_computed_tokens == 0
    assert new.num_preemptions == 1
    assert new.num_recomputed_tokens > 0
    assert new.num_output_tokens > 0
    assert not new.block_table
    assert old.num_preemptions == 0


def test_the_only_request_is_never_preempted() -> None:
    scheduler = _scheduler(3, block_size=2)
    request = _request("alone", 1, 6)
    scheduler.add(request)
    while scheduler.num_unfinished:
        output = scheduler.schedule()
        assert output.preempted == []
        _apply(scheduler, output)
    assert request.num_output_tokens == 6


def test_seats_are_limited() -> None:
    scheduler = _scheduler(64, seqs=2)
    for name in "abc":
        scheduler.add(_request(name, 2, 2))
    output = scheduler.schedule()
    assert _names(output) == [("a", 2), ("b", 2)]
    _apply(scheduler, output)
    _apply(scheduler, scheduler.schedule())
    assert _names(scheduler.schedule()) == [("c", 2)]


def test_fewer_seats_let_those_who_run_finish_and_admit_nobody() -> None:
    scheduler = _scheduler(64, seqs=4)
    for name, max_new_tokens in zip("abcdef", (2, 3, 5, 5, 1, 1), strict=True):
        scheduler.add(_request(name, 2, max_new_tokens))
    _apply(scheduler, scheduler.schedule())
    scheduler.limit(seqs=2, tokens=16)
    seen = []
    while scheduler.num_unfinished:
        output = scheduler.schedule()
        assert output.preempted == []
        seen.append("".join(request.request_id for request, _ in output.scheduled))
        _apply(scheduler, output)
    assert seen == ["abcd", "bcd", "cd", "cd", "ef"]


def test_more_seats_admit_at_once_and_a_smaller_budget_serves_the_oldest_first() -> None:
    scheduler = _scheduler(64, seqs=1)
    for name in "abc":
        scheduler.add(_request(name, 6, 9))
    _apply(scheduler, scheduler.schedule())
    scheduler.limit(seqs=3, tokens=16)
    output = scheduler.schedule()
    assert _names(output) == [("a", 1), ("b", 6), ("c", 6)]
    _apply(scheduler, output)
    scheduler.limit(seqs=3, tokens=2)
    assert _names(scheduler.schedule()) == [("a", 1), ("b", 1)]


@settings(max_examples=60, deadline=None)
@given(_workloads(), st.randoms(use_true_random=False))
def test_any_workload_finishes_under_limits_that_change(
    workload: tuple[dict[str, int], list[tuple[int, int, int]]], rng: random.Random
) -> None:
    limits, wanted = workload
    scheduler = _scheduler(**limits)
    requests = [_request(str(i), num_prompt, num_new) for i, (_, num_prompt, num_new) in enumerate(wanted)]
    num_ran = 0
    for output in _steps(scheduler, requests, [arrival for arrival, _, _ in wanted]):
        seats = scheduler.limits.max_num_seqs
        assert output.num_tokens <= scheduler.limits.max_num_batched_tokens
        assert len(scheduler.running) <= max(seats, num_ran)
        num_ran = len(scheduler.running)
        scheduler.limit(seqs=rng.randint(1, 6), tokens=rng.randint(1, 20))
    assert all(request.is_finished for request in requests)
    assert scheduler.allocator.num_free == limits["num_blocks"]


def test_nothing_overtakes_a_waiting_request() -> None:
    scheduler = _scheduler(4, block_size=2)
    for name, length in (("a", 4), ("big", 5), ("small", 1)):
        scheduler.add(_request(name, length, 2))
    assert _names(scheduler.schedule()) == [("a", 4)]


def test_waiting_request_can_be_taken_out() -> None:
    scheduler = _scheduler(4)
    request = _request("a", 3)
    scheduler.add(request)
    scheduler.finish(request)
    assert scheduler.num_unfinished == 0
    assert scheduler.schedule().scheduled == []


def test_integrity_check_sees_missing_blocks() -> None:
    scheduler = _scheduler(4)
    request = _request("a", 3)
    scheduler.add(request)
    _apply(scheduler, scheduler.schedule())
    request.num_computed_tokens = 5
    with pytest.raises(StateError, match="5 computed tokens in 1 blocks"):
        scheduler.check_integrity()
    scheduler.waiting.append(request)
    scheduler.running.clear()
    scheduler.blocks = RequestBlocks(BlockAllocator(4), block_size=4)
    with pytest.raises(StateError, match="waiting request holds blocks"):
        scheduler.check_integrity()


def test_rope_lengths_do_not_depend_on_chunks() -> None:
    request = _request("a", 3)
    request.token_ids += [7, 7]
    assert request.rope_lengths(0, 5) == [3, 3, 3, 4, 5]
    for cut in range(6):
        assert request.rope_lengths(0, cut) + request.rope_lengths(cut, 5) == [3, 3, 3, 4, 5]
