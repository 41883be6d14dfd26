"""Blocks that are found again: by whom, until when, and that nothing but the same is ever found."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inference_shardformer.config.inference import SamplingDefaults, SchedulerConfig
from inference_shardformer.engine.request import Request
from inference_shardformer.engine.sampling_params import SamplingParams
from inference_shardformer.engine.scheduler import Scheduler, SchedulerOutput
from inference_shardformer.errors import StateError
from inference_shardformer.kv_cache.block_allocator import BlockAllocator
from inference_shardformer.kv_cache.prefix import PrefixCache

LIMITS = SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=64)


class Machine:
    """A scheduler, and a memory whose slots hold what the keys of their tokens depend on; every read is compared."""

    def __init__(self, num_blocks: int, block_size: int, *, with_rope_lengths: bool = False) -> None:
        allocator = BlockAllocator(num_blocks)
        self.block_size = block_size
        self.cache = PrefixCache(allocator)
        self.scheduler = Scheduler(
            allocator, block_size=block_size, prefix_cache=self.cache, with_rope_lengths=with_rope_lengths
        )
        self.with_rope_lengths = with_rope_lengths
        self.weights = 0
        self.memory: dict[int, object] = {}
        self.started_with: dict[Request, int] = {}

    def content(self, request: Request, position: int) -> tuple:
        """What the key of one token depends on, but for the weights."""
        rope = request.rope_lengths(0, position + 1) if self.with_rope_lengths else []
        if request.rope_switch_length is not None:  # frequencies are of one of two kinds
            rope = [length > request.rope_switch_length for length in rope]
        return tuple(request.token_ids[: position + 1]), tuple(rope)

    def slot(self, request: Request, position: int) -> int:
        return request.block_table[position // self.block_size] * self.block_size + position % self.block_size

    def step(self, limits: SchedulerConfig = LIMITS, *, sample: int = 0) -> SchedulerOutput:
        """Schedule, read what is said to be computed, write what is scheduled, and add a token where one is due."""
        output = self.scheduler.schedule(limits)
        written: set[int] = set()
        for request, num_new_tokens in output.scheduled:
            start = request.num_computed_tokens
            assert 1 <= num_new_tokens <= request.num_uncomputed_tokens
            for position in range(start):
                salt, weights, content = self.memory[self.slot(request, position)]
                assert content == self.content(request, position)
                assert salt == request.sampling.cache_salt
                assert self.started_with.get(request, self.weights) <= weights
            for position in range(start, start + num_new_tokens):
                slot = self.slot(request, position)
                assert slot not in written
                written.add(slot)
        for request, num_new_tokens in output.scheduled:
            self.started_with.setdefault(request, self.weights)
            for position in range(request.num_computed_tokens, request.num_computed_tokens + num_new_tokens):
                mine = request.sampling.cache_salt, self.weights, self.content(request, position)
                self.memory[self.slot(request, position)] = mine
            request.num_computed_tokens += num_new_tokens
        for request in output.preempted:
            self.started_with.pop(request, None)
        for request, _ in output.scheduled:
            if request.num_uncomputed_tokens == 0:
                request.append(sample)
                if request.num_output_tokens == request.sampling.max_new_tokens:
                    self.end(request)
        self.scheduler.check_integrity()
        return output

    def end(self, request: Request) -> None:
        request.finish("length")
        self.scheduler.finish(request)

    def run(self, *requests: Request) -> None:
        for request in requests:
            self.scheduler.add(request)
        for _ in range(200):
            if self.scheduler.num_unfinished:
                self.step()
        assert not self.scheduler.num_unfinished


def _request(tokens: list[int] | range, max_new_tokens: int = 1, *, salt: str | None = None, **more) -> Request:
    sampling = SamplingParams(max_new_tokens=max_new_tokens, cache_salt=salt).resolve(SamplingDefaults())
    return Request(str(tokens), tokens, sampling, **more)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(3, 14), st.sampled_from([None, "plain", 5]))
def test_any_life_reads_what_it_would_have_computed(seed: int, block_size: int, num_blocks: int, rope: object) -> None:
    """Shared prompts, chunks, preemptions, aborts, resets, new weights, and rope that depends on lengths."""
    rng = random.Random(seed)
    machine = Machine(num_blocks, block_size, with_rope_lengths=rope is not None)
    scheduler, capacity = machine.scheduler, num_blocks * block_size
    switch = rope if isinstance(rope, int) else None
    requests: list[Request] = []
    if seed % 2:  # so that the same is computed twice at a time
        scheduler.blocks.should_wait = lambda *of: False
    for moment in range(400):
        if moment < 60 and rng.random() < 0.5:
            prompt = [rng.choice([0, 0, 0, 1]) for _ in range(rng.randint(1, capacity))]
            num_new = rng.randint(1, min(9, capacity + 1 - len(prompt)))
            requests.append(_request(prompt, num_new, salt=rng.choice([None, None, "a"]), rope_switch_length=switch))
            scheduler.add(requests[-1])
        fate = rng.random()
        if fate < 0.05 and scheduler.num_unfinished:
            machine.end(rng.choice([*scheduler.running, *scheduler.waiting]))
        elif fate < 0.08:
            scheduler.forget_prefixes()
        elif fate < 0.1:
            machine.weights += 1
            scheduler.forget_prefixes()
        if rng.random() < 0.3:
            scheduler.expect(LIMITS)
        seats, tokens = rng.randint(1, 6), rng.randint(1, 20)
        output = machine.step(
            SchedulerConfig(max_num_seqs=seats, max_num_batched_tokens=tokens), sample=rng.choice([0, 0, 1])
        )
        assert output.num_tokens <= tokens
        if moment >= 60 and not scheduler.num_unfinished:
            break
    assert all(request.is_finished for request in requests)
    assert scheduler.allocator.num_free == num_blocks
    assert machine.cache.num_blocks == len(scheduler.allocator.idle_blocks)


def test_a_finished_prompt_is_found_up_to_its_last_full_block() -> None:
    machine = Machine(16, 4)
    machine.run(_request(range(11)))
    again = _request(range(11))
    machine.scheduler.add(again)
    assert [num for _, num in machine.step().scheduled] == [3]
    assert again.num_cached_tokens == 8


def test_at_least_one_token_is_computed() -> None:
    machine = Machine(16, 4)
    machine.run(_request(range(8)))
    again = _request(range(8))
    machine.run(again)
    assert again.num_cached_tokens == 4


def test_generated_tokens_are_found_by_the_next_turn() -> None:
    machine = Machine(16, 4)
    machine.run(_request(range(3), 10))
    turn = _request([0, 1, 2, *[0] * 10, 7])
    machine.run(turn)
    assert turn.num_cached_tokens == 12  # the last generated token was never fed back, nor did it fill a block


def test_running_requests_share_and_shared_blocks_count_once() -> None:
    machine = Machine(8, 4)
    first, second = _request(range(18), 9), _request([*range(16), 99, 98], 2)
    machine.scheduler.add(first)
    machine.step()
    machine.scheduler.add(second)
    output = machine.step()
    assert [(request is second, num) for request, num in output.scheduled] == [(False, 1), (True, 2)]
    assert list(first.block_table[:4]) == list(second.block_table[:4])
    assert machine.scheduler.allocator.num_free == 8 - 5 - 1
    assert output.looked == (18, 16)


def test_capacity_knows_what_is_shared() -> None:
    """Eight blocks, of which the first request holds five: the second one fits because it shares four of its six."""
    machine = Machine(8, 4)
    for request in (_request(range(17), 2), _request([*range(16), *range(50, 57)], 2)):
        machine.scheduler.add(request)
        machine.step()
    assert len(machine.scheduler.running) == 1  # the first one had its second token
    first, second = _request(range(30, 47), 8), _request([*range(30, 46), *range(50, 57)], 2)
    machine = Machine(8, 4)
    machine.scheduler.add(first)
    machine.step()
    machine.scheduler.add(second)
    machine.step()
    assert machine.scheduler.running == [first, second]
    stranger = Machine(8, 4)
    stranger.scheduler.add(first := _request(range(30, 47), 8))
    stranger.step()
    stranger.scheduler.add(_request(range(60, 83), 2))
    stranger.step()
    assert stranger.scheduler.running == [first]


def test_what_begins_like_a_prompt_of_the_step_waits_for_it() -> None:
    machine = Machine(64, 4)
    names = [[*range(16), *range(50 + i, 57 + i)] for i in range(3)]  # 16 of 23 tokens in common
    stranger, little = _request(range(90, 99)), _request([*range(4), *range(70, 79)])
    requests = [stranger, *map(_request, names), little]
    for request in requests:
        machine.scheduler.add(request)
    assert [num for _, num in machine.step().scheduled] == [9, 23]
    assert [num for _, num in machine.step().scheduled] == [7, 7, 9]
    assert [request.num_cached_tokens for request in requests] == [0, 0, 16, 16, 4]


def test_nobody_waits_for_little_or_for_what_cannot_be_found() -> None:
    machine = Machine(64, 4)
    running = _request(range(9), 12)
    machine.scheduler.add(running)
    machine.scheduler.add(_request([*range(4), *range(70, 76)]))  # 4 of 10 tokens in common
    assert len(machine.step().scheduled) == 2
    salted = [_request(range(40, 49), salt=salt) for salt in (None, "a")]
    for request in salted:
        machine.scheduler.add(request)
    assert len(machine.step().scheduled) == 3
    late = [_request(range(60, 90)), _request(range(60, 90))]
    machine.scheduler.add(late[0])
    machine.step(SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=9))
    machine.scheduler.forget_prefixes()  # the rest of it will not be found
    machine.scheduler.add(late[1])
    assert {request for request, _ in machine.step().scheduled} == {running, *late}


def test_the_same_computed_twice_is_kept_once() -> None:
    machine = Machine(16, 4)
    twins = [_request(range(9), 4), _request(range(9), 4)]
    machine.scheduler.blocks.should_wait = lambda *of: False
    for twin in twins:
        machine.scheduler.add(twin)
    machine.step()
    assert set(twins[0].block_table).isdisjoint(twins[1].block_table)
    machine.step()
    assert list(twins[0].block_table[:2]) == list(twins[1].block_table[:2])
    assert twins[0].block_table[2] != twins[1].block_table[2]
    assert machine.scheduler.allocator.num_free == 16 - 4


def test_a_preempted_request_goes_on_where_it_was() -> None:
    machine = Machine(6, 4)
    old, new = _request(range(10), 10), _request(range(40, 47), 10)
    for request in (old, new):
        machine.scheduler.add(request)
    assert any(machine.step().preempted for _ in range(20))
    assert new.num_preemptions == 1
    lost = new.num_recomputed_tokens
    machine.run()
    assert new.num_recomputed_tokens < lost
    assert new.num_cached_tokens == 0  # nothing of the prompt was there at first


def test_the_longest_unused_is_reclaimed_first_and_ends_before_beginnings() -> None:
    machine = Machine(6, 2)
    machine.run(_request(range(5)))  # two full blocks
    machine.run(_request(range(10, 15)))
    machine.run(_request(range(5)))  # used again
    order = machine.scheduler.allocator.idle_blocks
    found = machine.cache.find(None, [(10, 11), (12, 13)])
    used = machine.cache.find(None, [(0, 1), (2, 3)])
    assert order == [found[1].block, found[0].block, used[1].block, used[0].block]
    machine.run(_request(range(20, 26)))  # three blocks, two of them free
    assert len(machine.cache.find(None, [(10, 11), (12, 13)])) == 1
    assert len(machine.cache.find(None, [(0, 1), (2, 3)])) == 2
    assert machine.cache.num_reclaimed == 1


def test_salts_are_worlds_apart() -> None:
    machine = Machine(16, 4)
    machine.run(_request(range(9), salt="a"))
    for salt, found in ((None, 0), ("b", 0), ("a", 8)):
        request = _request(range(9), salt=salt)
        machine.run(request)
        assert request.num_cached_tokens == found


def test_a_reset_forgets_and_running_requests_go_on_unseen() -> None:
    machine = Machine(16, 4)
    running = _request(range(9), 12)
    machine.scheduler.add(running)
    machine.step()
    machine.scheduler.forget_prefixes()
    machine.weights += 1
    other = _request(range(9), 2)
    machine.run(other)
    assert other.num_cached_tokens == 0
    assert running.is_finished
    late = _request([*range(9), *[0] * 9])
    machine.run(late)
    assert late.num_cached_tokens == 8  # what the other one computed, and nothing of the first


def test_prompts_of_one_length_share_under_length_dependent_rope() -> None:
    machine = Machine(32, 4, with_rope_lengths=True)
    machine.run(_request(range(11)))
    for prompt, found in (([*range(10), 99], 8), (range(12), 0)):
        request = _request(prompt)
        machine.run(request)
        assert request.num_cached_tokens == found


def test_lengths_count_only_by_their_side_of_the_switch() -> None:
    machine = Machine(32, 4, with_rope_lengths=True)
    machine.with_rope_lengths = False  # the memory holds tokens: short ones have equal keys, whatever their length
    machine.run(_request(range(9), rope_switch_length=12))
    for prompt, found in ((range(11), 8), (range(14), 0), (range(15), 12)):
        request = _request(prompt, rope_switch_length=12)
        machine.run(request)
        assert request.num_cached_tokens == found


def test_crossing_the_switch_leaves_shared_blocks_alone() -> None:
    machine = Machine(32, 4, with_rope_lengths=True)
    first, second = (_request(range(9), new, rope_switch_length=12) for new in (8, 3))
    machine.scheduler.add(first)
    machine.step()
    machine.scheduler.add(second)
    machine.step()
    before = list(second.block_table[:2])
    assert list(first.block_table[:2]) == before
    for _ in range(5):
        machine.step()
    assert first.num_tokens > 12
    assert set(first.block_table).isdisjoint(before)
    assert first.num_recomputed_tokens == 12
    machine.run()
    late = _request(range(9), rope_switch_length=12)
    machine.run(late)
    assert late.num_cached_tokens == 8


def test_only_what_is_held_or_idle_can_be_shared() -> None:
    allocator = BlockAllocator(4)
    blocks = allocator.allocate(2)
    allocator.keep(blocks[0])
    allocator.share([blocks[0]])
    allocator.free(blocks)
    assert allocator.num_free == 3
    allocator.free([blocks[0]])
    assert (allocator.num_free, allocator.idle_blocks) == (4, [blocks[0]])
    allocator.share([blocks[0]])
    allocator.check_integrity([[blocks[0]]])
    with pytest.raises(StateError, match=r"blocks \[1, 3\] are neither held nor idle"):
        allocator.share([0, 1, 3])
    allocator.free([blocks[0]])
    allocator.drop(blocks[0])
    assert (allocator.num_free, allocator.idle_blocks) == (4, [])
    with pytest.raises(StateError, match="freed twice"):
        allocator.keep(blocks[0])


def test_integrity_checks_see_what_is_wrong() -> None:
    machine = Machine(8, 4)
    machine.run(_request(range(9)))
    cache, allocator = machine.cache, machine.scheduler.allocator
    first, second = cache.find(None, [(0, 1, 2, 3), (4, 5, 6, 7)])
    allocator._idle = {first.block: None, second.block: None}
    with pytest.raises(StateError, match=f"block {first.block} would be reclaimed before block {second.block}"):
        cache.check_integrity()
    allocator._idle = {second.block: None, first.block: None}
    second.key = (9, 9, 9, 9)
    with pytest.raises(StateError, match=f"block {second.block} is filed under something else"):
        cache.check_integrity()
    second.key = (4, 5, 6, 7)
    cache.check_integrity()
    del cache._by_block[first.block]
    with pytest.raises(StateError, match="an idle block cannot be found"):
        cache.check_integrity()
    del cache._nodes[None, first.key]
    allocator._idle = {second.block: None}
    with pytest.raises(StateError, match=f"follows block {first.block}, which cannot be found"):
        cache.check_integrity()
    allocator._kept[second.block] = 0
    with pytest.raises(StateError, match="one that is not kept"):
        allocator.check_integrity()
    allocator._free.append(second.block)
    allocator._idle.clear()
    allocator._kept[second.block] = 1
    with pytest.raises(StateError, match="holds a block that is kept"):
        allocator.check_integrity()


def test_the_scheduler_checks_tables_against_nodes() -> None:
    machine = Machine(8, 4)
    request = _request(range(9), 3)
    machine.scheduler.add(request)
    machine.step()
    machine.step()
    request.token_ids[0] = 77
    with pytest.raises(StateError, match="do not hold its tokens"):
        machine.scheduler.check_integrity()
    request.kept.reverse()
    with pytest.raises(StateError, match="are not those of its table"):
        machine.scheduler.check_integrity()
