"""Sums through shared memory: exact, alike on all ranks, chosen together, and never a hang. Faults are real."""

from __future__ import annotations

import errno
import os
import signal
from typing import Any

import pytest
import torch
from ranks import RankResult, run_ranks

from inference_shardformer.distributed import choosing
from inference_shardformer.distributed.all_reduce import AllReduce, Refusal
from inference_shardformer.distributed.choosing import Meeting, choose_all_reduce
from inference_shardformer.distributed.segment import Segment
from inference_shardformer.distributed.shm import Place, ShmAllReduce, local_problem
from inference_shardformer.distributed.tensor_parallel import TensorParallelGroup
from inference_shardformer.errors import EnvironmentMismatchError
from inference_shardformer.kernels.cpu import build

CPU = torch.device("cpu")
HERE = Place("b", "n", 0)

IN_TIME_S = 15.0  # well before the timeout, which is 20 s or more where nobody is late on purpose


@pytest.fixture(scope="module", autouse=True)
def library() -> None:
    record = build.build()
    if record.error:
        pytest.skip(record.error)


@pytest.fixture(scope="module", params=[(2, 2), (3, 1)], ids=["two ranks of two threads", "three ranks"])
def sums(request: pytest.FixtureRequest) -> list[RankResult]:
    """What ranks say of sums of every type and size."""
    size, threads = request.param
    results = run_ranks("shm_ranks.py", "sums", str(threads), nproc=size)
    assert [result.returncode for result in results] == [0] * size, results[0].stderr
    return results


def test_every_sum_is_that_in_the_order_of_the_ranks_rounded_once(sums: list[RankResult]) -> None:
    assert [result.said["sums"]["wrong"] for result in sums] == [[]] * len(sums)
    assert {result.said["choice"] for result in sums} == {"shm"}


def test_all_ranks_have_the_same_bits(sums: list[RankResult]) -> None:
    assert len({result.said["sums"]["digest"] for result in sums}) == 1


def test_collectives_of_every_kind_in_a_row_keep_apart(sums: list[RankResult]) -> None:
    assert [result.said["mixed"] for result in sums] == [[]] * len(sums)


def test_gloo_gives_the_same_between_two_ranks_and_within_its_roundings_between_more(sums: list[RankResult]) -> None:
    for result in sums:
        assert result.said["gloo"]["choice"] == "gloo"
        worst = result.said["gloo"]["worst"]
        assert max(worst.values()) <= (0.0 if len(sums) == 2 else 1.0), worst


def test_a_closed_group_leaves_no_file_open(sums: list[RankResult]) -> None:
    assert [result.said["fds"] for result in sums] == [0] * len(sums)


@pytest.mark.parametrize(
    ("kind", "rank", "text", "within_s"),
    [
        ("close", 0, "rank 1 has closed the group", IN_TIME_S),
        ("late", 0, "rank 1 did not come within 1.5 s", IN_TIME_S),
        ("other", 0, "rank 1 brought a tensor of another size or type", IN_TIME_S),
        ("other", 1, "rank 0 brought a tensor of another size or type", IN_TIME_S),
        ("abort", 1, "this tensor-parallel group was closed in the middle of a collective", 6.0),  # before rank 0 comes
    ],
)
def test_whoever_waits_in_vain_is_told_why(
    sums: list[RankResult], kind: str, rank: int, text: str, within_s: float
) -> None:
    said = sums[rank].said["unguarded"][kind]
    assert text in said["text"]
    assert said["type"] == ("StateError" if kind == "abort" else "RuntimeError")
    assert said["seconds"] < within_s


def test_a_rank_killed_while_peers_wait_in_a_sum_is_the_same_failure_everywhere() -> None:
    *others, killed = run_ranks("shm_ranks.py", "kill", nproc=3)
    assert killed.returncode == -signal.SIGKILL
    for result in others:
        said = result.said
        assert (said["type"], said["rank"], said["phase"]) == ("RankFailure", 2, "decode"), said
        assert said["cause"] == "its process ended without a word"
        assert said["seconds"] < IN_TIME_S
    assert len({result.said["text"] for result in others}) == 1


def test_a_death_is_noticed_without_a_guard() -> None:
    waiting, killed = run_ranks("shm_ranks.py", "kill unguarded", nproc=2)
    assert killed.returncode == -signal.SIGKILL
    assert "rank 1 is dead" in waiting.said["text"]
    assert waiting.said["seconds"] < IN_TIME_S


def test_all_ranks_take_gloo_when_one_lacks_the_kernels_and_refuse_when_shm_was_asked_for() -> None:
    results = run_ranks("shm_ranks.py", "refused", nproc=2)
    for result in results:
        asked, auto = result.said["asked"], result.said["auto"]
        assert asked["type"] == "EnvironmentMismatchError"
        assert "rank 1: the native CPU kernels were never built" in asked["text"]
        assert "remedy: with a C++ compiler, run python -m" in asked["text"]
        ((name, ((code, message, _),)),) = auto["refused"]
        assert (auto["name"], name, code, auto["total"]) == ("gloo", "shm", "native_missing", [2.0] * 3)
        assert message.startswith("rank 1: ")


class TestReasons:
    def test_none(self):
        assert ShmAllReduce.reasons([HERE, HERE], [None, None]) == []

    @pytest.mark.parametrize(
        ("other", "code", "said"),
        [
            (HERE._replace(boot="c"), "hosts", "ranks 0 and 1 run on different hosts"),
            (HERE._replace(processes="m"), "namespaces", "different containers"),
            (HERE._replace(user=7), "users", "different users"),
        ],
    )
    def test_places(self, other, code, said):
        (reason,) = ShmAllReduce.reasons([HERE, other], [None, None])
        assert reason.code == code
        assert said in reason.message
        assert reason.remedy

    def test_a_rank_that_lacks_something(self):
        (reason,) = ShmAllReduce.reasons([HERE, HERE], [None, Refusal("x", "no", "mend")])
        assert reason == Refusal("x", "rank 1: no", "mend")

    def test_too_many(self):
        assert ShmAllReduce.reasons([HERE] * 65, [None] * 65)[0].code == "ranks"

    def test_this_process(self, monkeypatch):
        assert local_problem(CPU) is None
        assert local_problem(torch.device("cuda")).code == "device"
        monkeypatch.setattr("sys.platform", "darwin")
        assert local_problem(CPU).code == "system"

    def test_one_rank_has_none(self):
        assert TensorParallelGroup.single(CPU).all_reduce_choice.name == "none"


class Plain(AllReduce):
    name = "gloo"

    def __call__(self, t: torch.Tensor) -> None:
        raise NotImplementedError


def choose(gather, requested: str) -> Any:
    return choose_all_reduce(Plain(), Meeting(0, CPU, 1.0, gather, "test", "0"), requested)


class TestTrouble:
    """Rank 0 of a group whose other rank is made up of what it would say."""

    @pytest.fixture
    def no_memory(self, monkeypatch):
        def create(*args, **kwargs):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(choosing.Segment, "create", create)

    def test_too_little_memory(self, no_memory):
        chosen, choice = choose(lambda text: [text, text], "auto")
        assert chosen.name == choice.name == "gloo"
        ((_, (reason,)),) = choice.refused
        assert reason.code == "memory"
        assert "2 MiB of shared memory cannot be had" in reason.message

    def test_asked_for_by_name(self, no_memory):
        with pytest.raises(EnvironmentMismatchError, match="No space left") as caught:
            choose(lambda text: [text, text], "shm")
        assert "memory limit" in caught.value.remedy

    def test_a_rank_that_cannot_map(self):
        def gather(text: bytes) -> list[bytes]:
            return [text, text if text.startswith(b"[") else b"cannot map /proc/1/fd/3: denied"]

        _, choice = choose(gather, "auto")
        assert choice.refused[0][1][0] == Refusal(
            "mapping", "rank 1: cannot map /proc/1/fd/3: denied", "run all ranks in one container, as one user"
        )

    def test_a_rank_whose_lock_is_not_seen(self):
        _, choice = choose(lambda text: [text, text if text.startswith(b"[") else b""], "auto")
        assert choice.refused[0][1][0].message == "rank 0: the locks of ranks [1] are not seen"

    @pytest.mark.parametrize("requested", ["nccl", "none", "simulated"])
    def test_one_that_these_ranks_do_not_have(self, requested):
        with pytest.raises(EnvironmentMismatchError, match=f"'{requested}' cannot add up over these ranks") as caught:
            choose(lambda text: pytest.fail("nothing is to be compared"), requested)
        assert caught.value.remedy == "set shard.all_reduce to auto, shm or gloo"

    def test_not_asked_for(self):
        chosen, choice = choose(lambda text: pytest.fail("nothing is to be compared"), "gloo")
        assert (chosen.name, choice.name, choice.refused) == ("gloo", "gloo", ())


def test_a_segment_is_seen_by_whoever_maps_it_and_a_lock_ends_with_its_holder():
    first = Segment.create("test", num_bytes=4096, rank=0)
    second = Segment.open(first.path, num_bytes=4096, rank=1)
    first._memory[7] = 42
    assert second._memory[7] == 42
    assert first.sees(1)
    assert not first.sees(2)
    del second
    assert not first.sees(1)


def test_a_segment_that_cannot_be_had(monkeypatch):
    def refuse(fd: int, offset: int, length: int) -> None:
        refused.append(fd)
        raise OSError(errno.ENOSPC, "No space left on device")

    refused: list[int] = []
    monkeypatch.setattr("os.posix_fallocate", refuse)
    with pytest.raises(OSError, match="No space"):
        Segment.create("test", num_bytes=4096, rank=0)
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(refused[0])
    with pytest.raises(FileNotFoundError):
        Segment.open("/proc/self/fd/9999", num_bytes=4096, rank=0)
