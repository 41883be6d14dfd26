"""A request that outgrows the original length of its model's rope is computed again, in place."""

from __future__ import annotations

from inference_shardformer.config.inference import SamplingDefaults, SchedulerConfig
from inference_shardformer.engine.request import Request
from inference_shardformer.engine.sampling_params import SamplingParams
from inference_shardformer.engine.scheduler import Scheduler
from inference_shardformer.kv_cache.block_allocator import BlockAllocator

LENGTH = 6
LIMITS = SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=5)


def _request(num_prompt_tokens: int, *, switch: int | None = LENGTH) -> Request:
    sampling = SamplingParams(max_new_tokens=20).resolve(SamplingDefaults())
    return Request("r", range(num_prompt_tokens), sampling, rope_switch_length=switch)


def _step(scheduler: Scheduler, request: Request) -> int:
    """Run one step and add a token where one is due; how many tokens it computed."""
    ((scheduled, num_new_tokens),) = scheduler.schedule(LIMITS).scheduled
    assert scheduled is request
    request.num_computed_tokens += num_new_tokens
    if not request.num_uncomputed_tokens:
        request.append(0)
    scheduler.check_integrity()
    return num_new_tokens


def test_lengths_before_and_after() -> None:
    request = _request(4)
    assert request.rope_lengths(0, 4) == [4] * 4
    request.append(0)
    request.append(0)
    assert request.rope_lengths(3, 6) == [4, 5, 6]
    request.append(0)
    assert request.rope_lengths(0, 7) == [LENGTH + 1] * 7
    request.append(0)
    assert request.rope_lengths(7, 8) == [LENGTH + 1]


def test_a_long_prompt_is_long_from_the_start() -> None:
    request = _request(9)
    assert request.rope_lengths(0, 9) == [LENGTH + 1] * 9
    request.num_computed_tokens = 9
    request.append(0)
    assert request.num_computed_tokens == 9


def test_crossing_computes_everything_again_in_the_same_blocks() -> None:
    scheduler, request = Scheduler(BlockAllocator(8), block_size=4), _request(4)
    scheduler.add(request)
    assert [_step(scheduler, request) for _ in range(3)] == [4, 1, 1]  # now 7 tokens are known
    blocks = list(request.block_table)
    assert (request.num_computed_tokens, request.num_recomputed_tokens, request.num_preemptions) == (0, 6, 0)
    assert [_step(scheduler, request) for _ in range(4)] == [5, 2, 1, 1]
    assert list(request.block_table)[:2] == blocks


def test_without_a_switch_nothing_is_computed_again() -> None:
    scheduler, request = Scheduler(BlockAllocator(8), block_size=4), _request(4, switch=None)
    scheduler.add(request)
    assert [_step(scheduler, request) for _ in range(5)] == [4, 1, 1, 1, 1]
    assert request.num_recomputed_tokens == 0
