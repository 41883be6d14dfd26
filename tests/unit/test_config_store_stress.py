"""Sixteen readers and two writers: no torn pair, no epoch that goes back, no deadlock."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
from config_stores import SEQS, TOKENS, resolved

from inference_shardformer.config.inference import InferenceConfig
from inference_shardformer.config.store import ConfigStore

NUM_READERS = 16
NUM_WRITERS = 2
NUM_UPDATES = 100_000
DEADLINE_S = 120.0


def linked(seqs: int) -> int:
    """The partner of a value: every pair that is ever written obeys this."""
    return 4 * seqs + 7


class Pair(NamedTuple):
    epoch: int
    seqs: int
    tokens: int


class Reader(threading.Thread):
    """Reads until told to stop; notes every torn pair and every epoch that went back."""

    def __init__(self, read: Callable[[], Pair], stop: threading.Event) -> None:
        super().__init__(daemon=True)
        self.read = read
        self.stop = stop
        self.torn: list[Pair] = []
        self.backwards: list[tuple[int, int]] = []
        self.epochs: set[int] = set()

    def run(self) -> None:
        last = -1
        while not self.stop.is_set():
            for _ in range(25):
                pair = self.read()
                if pair.tokens != linked(pair.seqs):
                    self.torn.append(pair)
                if pair.epoch < last:
                    self.backwards.append((last, pair.epoch))
                last = pair.epoch
                self.epochs.add(last)
            time.sleep(0.002)  # readers take turns with the writers, or those would get a ninth of the interpreter


@pytest.fixture(autouse=True)
def eager_switching() -> Iterator[None]:
    """Let threads interrupt each other about every twenty bytecodes, not every 5 ms."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


def make_store() -> ConfigStore:
    inference = InferenceConfig.model_validate({"scheduler": {"max_num_seqs": 1, "max_num_batched_tokens": linked(1)}})
    return ConfigStore(resolved(inference))


def spellings(store: ConfigStore) -> list[Callable[[], Pair]]:
    """The ways to read both values from one snapshot."""

    def by_attribute() -> Pair:
        snapshot = store.current
        scheduler = snapshot.inference.scheduler
        return Pair(snapshot.epoch, scheduler.max_num_seqs, scheduler.max_num_batched_tokens)

    def by_path() -> Pair:
        snapshot = store.current
        return Pair(snapshot.epoch, snapshot.get("scheduler.max_num_seqs"), snapshot.get(TOKENS))

    def by_key() -> Pair:
        snapshot = store.current
        return Pair(snapshot.epoch, snapshot[SEQS], snapshot["scheduler.max_num_batched_tokens"])

    def by_what_was_asked() -> Pair:
        snapshot = store.current
        scheduler = snapshot.config.inference.scheduler
        return Pair(snapshot.epoch, scheduler.max_num_seqs, scheduler.max_num_batched_tokens)

    return [by_attribute, by_path, by_key, by_what_was_asked]


def test_readers_never_see_a_torn_pair_and_writers_never_lose_an_update():
    store = make_store()
    told: list[int] = []
    wrong: list[str] = []

    def check(changes) -> None:
        old = {change.path: change.old for change in changes}
        told.append(changes[0].epoch)
        if (store[SEQS], store.get(TOKENS)) != (old[SEQS], old[TOKENS]) or store.current.epoch != told[-1] - 1:
            wrong.append(f"epoch {told[-1]}: a callback does not read the values before the swap")

    store.subscribe("scheduler.*", check)
    written: list[list[tuple[int, int]]] = [[] for _ in range(NUM_WRITERS)]

    def write(number: int) -> None:
        for turn in range(NUM_UPDATES // NUM_WRITERS):
            seqs = 2 + 2 * (turn % 20_000) + number  # never equal to what stands there: each makes an epoch
            snapshot = store.update({SEQS: seqs, TOKENS: linked(seqs)}, source=str(number))
            written[number].append((snapshot.epoch, seqs))
            if snapshot[SEQS] != seqs:
                wrong.append(f"writer {number} got back another value than {seqs}")

    stop = threading.Event()
    reads = spellings(store)
    readers = [Reader(reads[number % len(reads)], stop) for number in range(NUM_READERS)]
    writers = [threading.Thread(target=write, args=(number,), daemon=True) for number in range(NUM_WRITERS)]
    deadline = time.monotonic() + DEADLINE_S
    for thread in [*readers, *writers]:
        thread.start()
    for thread in writers:
        thread.join(max(0.0, deadline - time.monotonic()))
    stop.set()
    for thread in readers:
        thread.join(10)
    assert not any(thread.is_alive() for thread in [*readers, *writers]), "deadlock, or far too slow"

    assert not wrong
    assert told == list(range(1, NUM_UPDATES + 1))
    assert sorted(epoch for pairs in written for epoch, _ in pairs) == told, "one epoch for each update"
    for pairs in written:
        assert [epoch for epoch, _ in pairs] == sorted(epoch for epoch, _ in pairs)
    assert store[SEQS] == dict(pair for pairs in written for pair in pairs)[NUM_UPDATES], "the last writer wins"
    for reader in readers:
        assert not reader.torn
        assert not reader.backwards
        assert len(reader.epochs) > 10, "a reader saw too little to tell anything"


def test_the_readers_do_notice_a_torn_pair_and_an_epoch_that_goes_back():
    """The same readers over a pair that is stored in two assignments."""
    values = {"epoch": 0, "seqs": 1, "tokens": linked(1)}
    stop = threading.Event()
    reader = Reader(lambda: Pair(values["epoch"], values["seqs"], values["tokens"]), stop)
    reader.start()
    deadline = time.monotonic() + 60
    while not (reader.torn and reader.backwards) and time.monotonic() < deadline:
        values["seqs"] += 1
        time.sleep(0.001)
        values["tokens"] = linked(values["seqs"])
        values["epoch"] = values["seqs"] % 5
    stop.set()
    reader.join(10)
    assert reader.torn
    assert reader.backwards
