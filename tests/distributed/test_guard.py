"""RankGuard: whatever happens to one rank, all ranks raise the same error in time. Faults are real."""

from __future__ import annotations

import signal
from typing import Any

import pytest
import torch
from ranks import RankResult, run_ranks

from inference_shardformer.distributed.guard import RankGuard
from inference_shardformer.distributed.stall import Progress, StallWatch
from inference_shardformer.distributed.tensor_parallel import TensorParallelGroup
from inference_shardformer.errors import PolicyError

DIED = "its process ended without a word"
STALLED = "stalled: other ranks have waited 1.5 s for it"
LEFT = "it closed its engine, or its program ended, while other ranks waited for it"
FAULTS = {
    "raise,1": "ValueError: broken on purpose",
    "raise,0": "ValueError: broken on purpose",
    "interrupt,1": "KeyboardInterrupt",
    "leave,1": LEFT,
    "leave,0": LEFT,
    "sleep,1": STALLED,
    "sleep,0": STALLED,
    "stop,1": STALLED,
    "stop,0": STALLED,
}


def failed_as(said: dict[str, Any], rank: int, cause: str) -> bool:
    """Whether a rank raised the expected failure, in time."""
    expected = {"type": "RankFailure", "rank": rank, "phase": "decode", "cause": cause}
    return expected.items() <= said.items() and said["seconds"] < 25


@pytest.fixture(scope="module")
def faults() -> list[RankResult]:
    """What two ranks say of every fault after which both still live."""
    return run_ranks("guard_ranks.py", "faults", *FAULTS, nproc=2, timeout_s=300)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_a_step_is_the_same_failure_on_every_rank(faults: list[RankResult], fault: str) -> None:
    kind, culprit = fault.split(",")
    own, others = faults[int(culprit)].said[fault], faults[1 - int(culprit)].said[fault]
    assert failed_as(others, int(culprit), FAULTS[fault]), others
    if kind in ("interrupt", "leave"):
        assert own["type"] == "KeyboardInterrupt"
    else:
        assert failed_as(own, int(culprit), FAULTS[fault]), own
        assert own["text"] == others["text"]
        # A rank that comes back late finds its group closed, or a collective of it broken off; or it finishes the
        # step, where the other rank's part of the collective was there before it left, and may not begin the next.
        late = ("StateError", "RuntimeError", "NoneType")
        assert own["origin"] in (("ValueError",) if kind == "raise" else late)
    assert others["origin"] == "NoneType"


@pytest.fixture(scope="module")
def four() -> list[RankResult]:
    """Rank 2 of four raises; then, in two pairs of the same ranks, rank 1 of the one and rank 0 of the other die."""
    return run_ranks("guard_ranks.py", "four", nproc=4)


def test_four_ranks_fail_alike(four: list[RankResult]) -> None:
    assert all(failed_as(result.lines[0], 2, FAULTS["raise,1"]) for result in four), four
    assert len({result.lines[0]["text"] for result in four}) == 1


def test_a_killed_rank_is_named_in_each_of_two_groups_of_one_world(four: list[RankResult]) -> None:
    first, killed_member, killed_leader, last = four
    assert killed_member.returncode == killed_leader.returncode == -signal.SIGKILL
    assert failed_as(first.said, 1, DIED), first
    assert failed_as(last.said, 0, DIED), last


@pytest.fixture(scope="module")
def phases() -> list[dict[str, Any]]:
    """What two ranks say of initialisation phases."""
    return [result.said for result in run_ranks("guard_ranks.py", "phases", nproc=2)]


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("typed", {"type": "PolicyError", "text": "rank 1: bad head\n  remedy: mend it"}),
        ("alike", {"type": "CapacityError", "text": "no room"}),
        ("plain", {"type": "RankFailure", "rank": 1, "phase": "load", "cause": "KeyError: 'lm_head'"}),
        ("closed", {"type": "StateError"}),
    ],
)
def test_an_error_in_a_phase_is_raised_by_all(phases: list[Any], case: str, expected: dict[str, Any]) -> None:
    for said in phases:
        assert expected.items() <= said["phases"][case].items()


def test_a_phase_returns_what_each_rank_made_and_an_error_in_one_does_not_end_the_group(phases: list[Any]) -> None:
    assert [said["phases"]["well"] for said in phases] == [{"value": 0}, {"value": 10}]
    assert [said["phases"]["after"] for said in phases] == [{"value": "still fine"}] * 2


def test_the_rank_that_failed_keeps_its_own_exception_as_the_cause(phases: list[Any]) -> None:
    assert [said["phases"]["typed"]["origin"] for said in phases] == ["NoneType", "PolicyError"]
    assert [said["phases"]["plain"]["origin"] for said in phases] == ["NoneType", "KeyError"]


def test_facts_that_differ_are_named_with_ranks_and_values(phases: list[Any]) -> None:
    assert [said["phases"]["agreed"] for said in phases] == [{"value": None}] * 2
    texts = {said["phases"]["differ"]["text"] for said in phases}
    assert len(texts) == 1
    text = texts.pop()
    assert "dtype: rank 0 has 'fp32', rank 1 has 'bf16'" in text
    assert "only0: rank 0 has 'x', rank 1 has nothing" in text


def test_a_failed_group_stays_failed_and_its_neighbours_work_on(phases: list[Any]) -> None:
    for said in phases:
        first, again = said["step"]["step"], said["step"]["again"]
        assert first["text"] == again["text"] == "rank 1 failed during decode: cache full\n  remedy: make room"
        assert first["cause_code"] == "capacity"
        assert said["step"]["other"] == {"value": None}
        assert said["step"]["world"] == 2.0


def test_slow_is_not_stalled(phases: list[Any]) -> None:
    for said in phases:
        assert said["stall"]["slow"] == {"value": None}
        stalled = said["stall"]["stalled"]
        assert {"type": "RankFailure", "rank": 1, "phase": "load"}.items() <= stalled.items()


def test_a_forked_process_may_not_use_the_group_and_does_not_end_it(phases: list[Any]) -> None:
    for rank, said in enumerate(phases):
        assert said["forked"]["child"]["type"] == "StateError"
        assert said["forked"]["child"]["text"].startswith(f"this process was forked from rank {rank}, which is process")
        assert said["forked"]["parent"] == {"value": None}


def test_a_healthy_step_costs_microseconds(phases: list[Any]) -> None:
    assert min(said["phases"]["step_us"] for said in phases) < 50


def test_with_one_rank_nothing_is_wrapped() -> None:
    guard = RankGuard(TensorParallelGroup.single(torch.device("cpu")), timeout_s=1)
    error = PolicyError("mine")
    for wrapped in (lambda: guard.together("load", lambda: _raise(error)), lambda: _raise_in_step(guard, error)):
        with pytest.raises(PolicyError) as caught:
            wrapped()
        assert caught.value is error
    assert guard.together("load", lambda: 7) == 7
    guard.agree("resolve", {"dtype": "bf16"})
    guard.close()


def test_the_rank_that_others_wait_for_is_late_and_nobody_else() -> None:
    watch = StallWatch(size=3, timeout_s=10)
    watch.heard(0, Progress(4, 8, True, 0.0, "decode"))
    watch.heard(1, Progress(4, 7, True, 0.0, "decode"))
    watch.heard(2, Progress(4, 8, True, 0.0, "decode"))
    assert [watch.tick(1.0) for _ in range(10)] == [None] * 9 + [1]
    watch.heard(1, Progress(4, 8, True, 0.0, "decode"))
    assert [watch.tick(1.0) for _ in range(50)] == [None] * 50


def test_time_in_which_the_watcher_itself_stood_still_counts_little() -> None:
    watch = StallWatch(size=2, timeout_s=10)
    watch.heard(0, Progress(1, 0, True, 0.0, "decode"))
    assert watch.tick(3600.0) is None


def test_a_rank_that_nobody_waits_for_may_idle() -> None:
    watch = StallWatch(size=2, timeout_s=1)
    watch.heard(0, Progress(5, 9, False, 0.0, "between steps"))
    assert [watch.tick(1.0) for _ in range(5)] == [None] * 5


def _raise(error: Exception) -> None:
    raise error


def _raise_in_step(guard: RankGuard, error: Exception) -> None:
    with guard.step("decode"):
        raise error
