"""Several threads on one engine: the same results as one after another, and nobody waits for long."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from inference_shardformer.engine.fair_lock import FairLock
from inference_shardformer.engine.outputs import RequestOutput
from inference_shardformer.engine.sampling_params import SamplingParams

SEQS = "inference.scheduler.max_num_seqs"
TOKENS = "inference.scheduler.max_num_batched_tokens"
SOON_S = 60.0


def _requests(tiny: SimpleNamespace) -> list[tuple[list[int], SamplingParams]]:
    return [
        (prompt, SamplingParams(max_new_tokens=2 + i % 9, temperature=i % 2 / 2, seed=i, repetition_penalty=1 + i % 3))
        for i, prompt in enumerate(tiny.ragged_prompts(18, seed=3))
    ]


def _facts(output: RequestOutput) -> tuple:
    return output.prompt_token_ids, output.token_ids, output.text, output.finish_reason


@pytest.mark.parametrize("seed", range(3))
def test_concurrent_calls_give_the_results_of_serial_ones(tiny: SimpleNamespace, seed: int) -> None:
    requests = _requests(tiny)
    serial = [_facts(tiny.Setup().engine().generate([p], s)[0]) for p, s in requests]
    engine = tiny.Setup(num_blocks=24).engine()
    results: list[RequestOutput] = []
    done = threading.Event()

    def generate(request: tuple) -> None:
        results.extend(engine.generate([request[0]], request[1]))

    def stream(request: tuple) -> None:
        chunks = list(engine.stream([request[0]], request[1]))
        wanted = next(facts for facts in serial if facts[0] == tuple(request[0]))
        assert tuple(token for chunk in chunks for token in chunk.token_ids) == wanted[1]

    def add(request: tuple) -> None:
        engine.add_request(*request)

    def abort(_: object) -> None:
        engine.abort(engine.add_request([7] * 20, SamplingParams(max_new_tokens=50)))

    def update() -> None:
        rng = random.Random(seed)
        while not done.is_set():
            before = engine.config.current.epoch
            changes = {SEQS: rng.randint(1, 9), TOKENS: rng.randint(1, 60)}
            after = engine.update_config(changes).snapshot
            assert after.epoch >= before
            assert (after[SEQS], after[TOKENS]) == tuple(changes.values())

    updater = threading.Thread(target=update)
    updater.start()
    work = list(zip([generate, stream, add] * 6, requests, strict=True))
    with ThreadPoolExecutor(5) as pool:
        for future in [pool.submit(abort, None), *(pool.submit(call, request) for call, request in work)]:
            future.result(SOON_S)
    stepped: list[RequestOutput] = []
    while engine.has_unfinished():
        stepped += engine.step()
    done.set()
    updater.join(SOON_S)
    assert not updater.is_alive()
    added = [output for output in stepped if output.finish_reason != "abort"]
    assert len(stepped) == len(added) + 1
    streamed = [facts for (call, _), facts in zip(work, serial, strict=True) if call is stream]
    assert sorted([*map(_facts, results), *map(_facts, added), *streamed]) == sorted(serial)
    assert engine.config.current.epoch > 0
    tiny.assert_all_free(engine)


def test_each_request_sees_one_epoch_while_defaults_change(tiny: SimpleNamespace) -> None:
    engine = tiny.Setup(num_blocks=256).engine()
    lengths = {0: 16}
    done = threading.Event()

    def update() -> None:
        rng = random.Random(1)
        while not done.is_set():
            length = rng.randint(1, 20)
            lengths[engine.update_config({"sampling.max_new_tokens": length}).snapshot.epoch] = length

    updater = threading.Thread(target=update)
    updater.start()
    with ThreadPoolExecutor(4) as pool:
        outputs = list(pool.map(lambda i: engine.generate([[i]])[0], range(60)))
    done.set()
    updater.join(SOON_S)
    assert {len(output.token_ids) == lengths[output.config_epoch] for output in outputs} == {True}
    assert len({output.config_epoch for output in outputs}) > 3


def test_update_comes_before_the_next_step_of_a_generation(tiny: SimpleNamespace) -> None:
    engine = tiny.Setup().engine()
    model = engine._runner._model
    epochs: list[int] = []
    in_step = threading.Event()

    def slow(**arguments: object) -> object:
        if len(epochs) == 3:
            in_step.set()
            while not engine._access.lock._waiting:  # until the other thread has queued up behind this step
                time.sleep(0.001)
        return model(**arguments)

    def update() -> None:
        in_step.wait(SOON_S)
        engine.update_config({SEQS: 9})

    engine._runner._model = slow
    updater = threading.Thread(target=update)
    updater.start()
    engine.generate([[1]], on_step=lambda stats: epochs.append(stats.config_epoch))
    updater.join(SOON_S)
    assert epochs == [0] * 4 + [1] * 12


def test_lock_is_reentrant_and_serves_in_order() -> None:
    lock = FairLock()
    order: list[int] = []

    def work(number: int) -> None:
        with lock, lock:
            order.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    with lock:
        for count, thread in enumerate(threads, 1):
            thread.start()
            while len(lock._waiting) < count:
                pass
        with lock:
            assert order == []
    for thread in threads:
        thread.join(SOON_S)
    assert order == list(range(8))


@pytest.mark.parametrize("comes_in_time", [True, False], ids=["lock came meanwhile", "still waiting"])
def test_interrupted_waiter_leaves_the_queue(comes_in_time: bool) -> None:
    """Ctrl-C while waiting: raised by a gate in the place of the real one."""
    lock = FairLock()
    lock.__enter__()
    lock._owner = -1  # another thread

    class Gate:
        def __init__(self) -> None:
            self.num_acquired = 0

        def acquire(self) -> None:
            self.num_acquired += 1
            if self.num_acquired == 2:
                if comes_in_time:
                    lock.__exit__()
                raise KeyboardInterrupt

        def release(self) -> None:
            return None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("inference_shardformer.engine.fair_lock.Lock", Gate)
        with pytest.raises(KeyboardInterrupt), lock:
            pytest.fail("entered")
    assert not lock._waiting
    if not comes_in_time:
        lock.__exit__()
    assert lock._owner is None
    assert lock._depth == 0
