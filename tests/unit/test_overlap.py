"""Steps prepared while another one runs: what comes out is what comes out without, whatever happens in between."""

from __future__ import annotations

import random
from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from inference_shardformer import InferenceConfig
from inference_shardformer.config.inference import SamplingDefaults, SchedulerConfig
from inference_shardformer.engine import step_runner
from inference_shardformer.engine.ahead import Ahead
from inference_shardformer.engine.batch import BatchBuilder, ForwardBatch
from inference_shardformer.engine.request import Request
from inference_shardformer.engine.sampling_params import SamplingParams
from inference_shardformer.engine.scheduler import Scheduler
from inference_shardformer.engine.staging import OnItsWay
from inference_shardformer.errors import StateError
from inference_shardformer.kv_cache.block_allocator import BlockAllocator
from inference_shardformer.resolving.resolution import resolve_overlap

LETTERS = range(97, 123)
CPU = torch.device("cpu")
LIMITS = SchedulerConfig()


def _params(rng: random.Random) -> SamplingParams:
    """Requests that end in every way: by length, by a token, by a text, by a poisoned context."""
    return SamplingParams(
        max_new_tokens=rng.choice([1, 2, 3, 9, 20]),
        temperature=rng.choice([0.0, 0.0, 0.8]),
        seed=rng.randrange(100),
        stop=rng.choice([(), ("q",), ("ab", "z")]),
        stop_token_ids=rng.choice([(), (101, 102)]),
        ignore_eos=rng.random() < 0.5,
        repetition_penalty=rng.choice([1.0, 1.0, 1.3]),
        logprobs=rng.choice([None, None, 0, 3]),
        presence_penalty=rng.choice([0.0, 0.0, 1.0]),
        min_new_tokens=rng.choice([0, 1]),
    )


def _program(engine: object, seed: int, rank: int = 0) -> list:
    """A random life of an engine; what each step hands out."""
    rng = random.Random(seed)
    told: list = []
    for moment in range(400):
        if moment < 40:
            for _ in range(rng.choice([0, 0, 1, 3])):
                prompt, params = [rng.randrange(97, 123) for _ in range(rng.choice([1, 2, 9, 20]))], _params(rng)
                engine.add_request(prompt, params, request_id=f"r{moment}-{rng.random()}")
            victim = rng.random()
            known = sorted(engine._core.live)
            if known and victim < 0.1:
                engine.abort(known[int(victim * 10 * len(known))])
            if rng.random() < 0.1:
                limits = {"max_num_seqs": rng.choice([1, 3, 64]), "max_num_batched_tokens": rng.choice([1, 4, 256])}
                engine.update_config({f"inference.scheduler.{name}": value for name, value in limits.items()})
        elif not engine.has_unfinished():
            return told
        told.append(engine.step())
        engine._core.scheduler.check_integrity()
    raise AssertionError("the requests do not come to an end")


def _alike(one: ForwardBatch, other: ForwardBatch) -> None:
    for mine, its in ((one, other), (one.ragged, other.ragged)):
        for each in fields(mine):
            if each.name != "ragged":
                a, b = getattr(mine, each.name), getattr(its, each.name)
                assert torch.equal(a, b) and a.dtype == b.dtype if isinstance(a, torch.Tensor) else a == b, each.name


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[ForwardBatch]:
    """Every prepared batch that is taken beside one built from what is known by then; those that were taken."""
    taken = []
    take = Ahead.take

    def checking(self: Ahead, output: object) -> ForwardBatch | None:
        batch = take(self, output)
        if batch is not None:
            _alike(batch, self._build(output))
            taken.append(batch)
        return batch

    monkeypatch.setattr(Ahead, "take", checking)
    return taken


@pytest.mark.parametrize("rope", [False, True], ids=["plain", "length-dependent rope"])
@pytest.mark.parametrize("num_blocks", [12, 200])
def test_any_life_gives_the_same_with_and_without(tiny, checked, num_blocks: int, rope: bool) -> None:
    limits = {"num_blocks": num_blocks, "max_num_seqs": 8, "length_dependent_rope": rope, "poison": 120}
    alphabet = [*LETTERS, tiny.EOS]
    for seed in range(3):
        alone = [_program(tiny.Setup(**limits, alphabet=alphabet, overlap=o).engine(), seed) for o in ("off", "on")]
        assert repr(alone[0]) == repr(alone[1])  # an error equals itself alone
        outputs = [output for step in alone[0] for output in step]
        assert len({output.finish_reason for output in outputs}) >= 3
    assert len(checked) > 25


def test_ranks_agree_with_one_rank(tiny, checked) -> None:
    limits = {"num_blocks": 14, "alphabet": [*LETTERS, tiny.EOS], "overlap": "on"}
    prompts = tiny.ragged_prompts(9)
    params = [SamplingParams(temperature=i % 3 / 2, seed=i, stop="q", max_new_tokens=3 * i + 1) for i in range(9)]
    expected = tiny.Setup(**{**limits, "overlap": "off"}).engine().generate(prompts, params)

    def program(group: object) -> list:
        engine = tiny.Setup(**limits).engine(group, tiny.NullGuard())
        outputs = engine.generate(prompts, params)
        tiny.assert_all_free(engine)
        return outputs

    assert tiny.run_ranks(2, program) == [expected] * 2
    assert checked


def test_every_step_of_a_steady_batch_is_prepared(tiny) -> None:
    """Also where requests reach their length, which is known beforehand."""
    engine = tiny.Setup(num_blocks=200, overlap="on").engine()
    engine.generate(tiny.ragged_prompts(6), [SamplingParams(max_new_tokens=4 + i) for i in range(6)])
    assert engine._core.steps.ahead.num_taken == 8  # 9 steps, the first holds the prompts


def test_an_end_that_nobody_foresaw_drops_what_was_prepared(tiny, checked) -> None:
    engine = tiny.Setup(overlap="on", alphabet=LETTERS).engine()
    plain = tiny.Setup(alphabet=LETTERS)
    stop = plain.greedy([5, 6], 16)[4]
    outputs = engine.generate([[5, 6], [7, 8]], [SamplingParams(stop_token_ids=[stop]), SamplingParams()])
    end = outputs[0].usage.num_generated_tokens
    assert outputs[1].token_ids == tuple(plain.greedy([7, 8], 16))
    assert [batch.ragged.num_seqs for batch in checked] == [2] * (end - 1) + [1] * (16 - end - 1)


def test_a_failure_in_a_step_frees_what_was_taken_ahead(tiny) -> None:
    engine = tiny.Setup(overlap="on", fail_at=4).engine()
    with pytest.raises(RuntimeError, match="the model broke"):
        engine.generate(tiny.ragged_prompts(5))
    tiny.assert_all_free(engine)
    assert len(engine.generate(tiny.ragged_prompts(5))) == 5


def test_the_ids_are_waited_for_last(tiny, monkeypatch) -> None:
    done: list[str] = []
    prepare = Ahead.prepare

    class Noting(OnItsWay):
        def __init__(self, *args: object) -> None:
            done.append("sampled")
            super().__init__(*args)

        def wait(self) -> list[int]:
            done.append("wait")
            return super().wait()

    def preparing(self: Ahead, *args: object) -> None:
        done.append("prepare")
        prepare(self, *args)

    monkeypatch.setattr(step_runner, "OnItsWay", Noting)
    monkeypatch.setattr(Ahead, "prepare", preparing)
    setup = tiny.Setup(overlap="on", alphabet=LETTERS)
    decode = tiny.ByteTokenizer.decode
    monkeypatch.setattr(
        tiny.ByteTokenizer, "decode", lambda self, *args, **more: done.append("text") or decode(self, *args, **more)
    )
    stream = setup.engine().stream([[1, 2]], SamplingParams(max_new_tokens=4))
    next(stream)
    step = ["sampled", "prepare", "wait"]
    assert done == [*step, "sampled", "prepare", "text", "wait"]
    rest = list(stream)
    assert [len(chunk.token_ids) for chunk in rest] == [1, 1, 1]


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 7), st.integers(6, 40), st.sampled_from([[*LETTERS, 256], [0xE6, 0x97, 0xA5, 97, 256]]))
def test_chunks_are_the_same(tiny: SimpleNamespace, num_prompts: int, num_blocks: int, alphabet: list[int]) -> None:
    prompts = tiny.ragged_prompts(num_prompts, longest=8)
    params = [SamplingParams(stop="q", max_new_tokens=2 * i + 1) for i in range(num_prompts)]
    chunks = []
    for overlap in ("off", "on"):
        engine = tiny.Setup(num_blocks=num_blocks, alphabet=alphabet, overlap=overlap).engine()
        found = list(engine.stream(prompts, params))
        chunks.append([[chunk for chunk in found if chunk.index == index] for index in range(num_prompts)])
        tiny.assert_all_free(engine)
    assert chunks[0] == chunks[1]


def test_an_abort_comes_after_the_chunk_of_the_step_before(tiny) -> None:
    engine = tiny.Setup(overlap="on", alphabet=LETTERS).engine()
    chunks = engine.stream([[1], [2]])
    first = next(chunks)  # of the first of two steps
    assert engine.abort(first.request_id)
    mine = [chunk for chunk in chunks if chunk.index == first.index]
    assert [(len(chunk.token_ids), len(chunk.text), chunk.finish_reason) for chunk in mine] == [
        (1, 1, None),
        (0, 0, "abort"),
    ]


def _request(num_prompt_tokens: int, max_new_tokens: int = 4) -> Request:
    sampling = SamplingParams(max_new_tokens=max_new_tokens).resolve(SamplingDefaults())
    return Request(f"{num_prompt_tokens}/{max_new_tokens}", range(num_prompt_tokens), sampling)


def _running(requests: list[Request], *, num_blocks: int = 16) -> Scheduler:
    """A scheduler, block size 4, in the middle of the step that computes all prompts."""
    scheduler = Scheduler(BlockAllocator(num_blocks), block_size=4)
    for request in requests:
        scheduler.add(request)
    for request, num_new_tokens in scheduler.schedule(LIMITS).scheduled:
        request.num_computed_tokens += num_new_tokens
    return scheduler


def test_what_is_expected_is_what_is_scheduled() -> None:
    requests = [_request(4), _request(6), _request(3, 1), _request(8)]
    scheduler = _running(requests)
    free = scheduler.allocator.num_free
    expected = scheduler.expect(LIMITS)
    assert [(request, count) for request, count in expected.scheduled] == [(requests[i], 1) for i in (0, 1, 3)]
    assert expected.num_decodes == 3
    assert scheduler.allocator.num_free == free - 2  # those at a block boundary
    assert scheduler.expect(LIMITS) == expected
    assert scheduler.allocator.num_free == free - 2
    for request in requests:
        request.append(0)
    requests[2].finish("length")
    scheduler.finish(requests[2])
    tables = [list(request.block_table) for request in requests]
    assert scheduler.schedule(LIMITS) == expected
    assert [list(request.block_table) for request in requests] == tables


def test_nothing_is_expected_where_it_is_not_certain() -> None:
    in_the_middle = _running([_request(4)])
    in_the_middle.running[0].num_computed_tokens -= 1
    assert in_the_middle.expect(LIMITS) is None
    assert _running([]).expect(LIMITS) is None
    assert _running([_request(4, 1)]).expect(LIMITS) is None  # nobody stays
    two = _running([_request(4), _request(5)])
    assert two.expect(SchedulerConfig(max_num_batched_tokens=1)) is None
    full = _running([_request(8), _request(8)], num_blocks=5)
    free = full.allocator.num_free
    assert free == 1
    assert full.expect(LIMITS) is None  # one of them will be preempted
    assert full.allocator.num_free == free


def test_somebody_who_waits_may_be_admitted() -> None:
    scheduler = _running([_request(5), _request(6)], num_blocks=9)
    scheduler.add(_request(8))
    assert scheduler.expect(LIMITS) is None
    assert scheduler.expect(SchedulerConfig(max_num_seqs=2)) is not None  # no seat
    scheduler.waiting[0].token_ids += range(40)
    assert scheduler.expect(LIMITS) is not None  # no room
    scheduler.running[0].token_ids += [0] * 3  # its last token is being sampled
    scheduler.running[0].num_computed_tokens += 3
    assert scheduler.expect(LIMITS) is None


def test_another_padding_drops_what_was_prepared() -> None:
    padding = [2]
    build = BatchBuilder(block_size=4, device=CPU, with_rope_lengths=False, padding=lambda decodes, seqs: padding[0])
    requests = [_request(4), _request(6)]
    scheduler = _running(requests)
    ahead = Ahead(scheduler, build)
    present = SimpleNamespace(requests_to_sample=requests)
    for size in (2, 0):
        padding[0] = 2
        ahead.prepare(present, torch.tensor([7, 9]), LIMITS)
        tokens = [list(request.token_ids) for request in requests]
        for request, token_id in zip(requests, (7, 9), strict=True):
            request.append(token_id)
        padding[0] = size
        output = scheduler.schedule(LIMITS)
        batch = ahead.take(output)
        assert (batch is not None) == (size == 2)
        if batch is not None:
            assert batch.input_ids.tolist() == [[7, 9, 9, 9]]
            _alike(batch, build(output))
        for request, known in zip(requests, tokens, strict=True):
            request.token_ids[:] = known
    assert ahead.take(output) is None
    assert ahead.num_taken == 1


def test_a_newcomer_as_long_as_whoever_left_is_not_mistaken_for_it() -> None:
    stays, leaves, newcomer = _request(4), _request(8), _request(9)
    scheduler = _running([stays, leaves])
    build = BatchBuilder(block_size=4, device=CPU, with_rope_lengths=False, padding=lambda decodes, seqs: 0)
    ahead = Ahead(scheduler, build)
    ahead.prepare(SimpleNamespace(requests_to_sample=[stays, leaves]), torch.tensor([7, 9]), LIMITS)
    stays.append(7)
    leaves.append(9)
    leaves.finish("stop")
    scheduler.finish(leaves)
    scheduler.add(newcomer)
    output = scheduler.schedule(LIMITS)
    assert [(request, count) for request, count in output.scheduled] == [(stays, 1), (newcomer, 9)]
    assert ahead.take(output) is None


@pytest.mark.parametrize(
    ("asked", "device", "value", "has_reason"),
    [
        ("auto", "cpu", "off", True),
        ("auto", "cuda", "on", True),
        ("on", "cpu", "on", False),
        ("off", "cuda", "off", False),
    ],
)
def test_auto_is_on_where_the_host_would_wait(asked: str, device: str, value: str, has_reason: bool) -> None:
    decided = resolve_overlap(InferenceConfig(scheduler={"overlap": asked}), device)
    assert (decided.value, bool(decided.reason)) == (value, has_reason)


def test_a_device_is_not_waited_for_once_the_ranks_have_failed() -> None:
    looked: list[bool] = []
    way = OnItsWay(torch.tensor([3, 4]), lambda: looked.append(True) or len(looked) == 3)
    assert way.wait() == [3, 4]
    way._is_here = SimpleNamespace(query=lambda: False)
    with pytest.raises(StateError, match="the ranks failed while this one waited") as caught:
        way.wait()
    assert len(looked) == 3
    assert "end this process" in caught.value.remedy
    way._is_here = SimpleNamespace(query=lambda: True)
    assert way.wait() == [3, 4]
