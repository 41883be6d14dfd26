"""Which device a rank gets, and two ranks on one: by gloo where that was asked for, else a refusal with a name."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from ranks import run_ranks

from inference_shardformer.distributed.devices import Seat, device_of_rank, refuse_shared_devices
from inference_shardformer.distributed.environment import RankEnvironment
from inference_shardformer.errors import EnvironmentMismatchError

CUDA = torch.device("cuda", 0)


def _local(rank: int, size: int = 4) -> RankEnvironment:
    return RankEnvironment(rank, size, rank, size, is_torchrun=True)


@pytest.fixture
def two_devices(monkeypatch):
    """As many as torch says there are; the first reaches the second, not the other way round."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda own, other: own == 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=f"GPU-{index}"))


def test_each_local_rank_has_its_own(two_devices) -> None:
    for request in ("auto", "nccl", "symm_mem", "gloo"):
        assert device_of_rank("cuda", _local(1), all_reduce=request) == torch.device("cuda", 1)
    assert device_of_rank("cpu", _local(3), all_reduce="auto") == torch.device("cpu")


def test_a_rank_too_many_is_told_how_to_share(two_devices) -> None:
    for request in ("auto", "nccl", "symm_mem"):
        with pytest.raises(EnvironmentMismatchError) as caught:
            device_of_rank("cuda", _local(2), all_reduce=request)
        assert "local rank 2 has no CUDA device of its own: this process sees 2, and 4 ranks run" in str(caught.value)
        assert "set shard.all_reduce=gloo" in caught.value.remedy


def test_with_gloo_ranks_share_in_turn(two_devices) -> None:
    devices = [device_of_rank("cuda", _local(rank), all_reduce="gloo").index for rank in range(4)]
    assert devices == [0, 1, 0, 1]


def test_a_seat_is_known_to_other_processes(two_devices) -> None:
    first, second = Seat.of(CUDA), Seat.of(torch.device("cuda", 1))
    assert first[1:] == ("GPU-0", ("GPU-1",), ("GPU-1",))
    assert second[1:] == ("GPU-1", ("GPU-0",), ())
    assert Seat.from_json(first.to_json()) == first
    assert Seat.of(torch.device("cpu")).device == ""


def test_the_same_device_twice_is_refused_by_both_names(two_devices) -> None:
    others = [Seat("elsewhere", "GPU-0"), Seat("elsewhere", "GPU-1")]

    def gather(text: bytes) -> list[bytes]:
        return [*(seat.to_json().encode() for seat in others), text, text]

    with pytest.raises(EnvironmentMismatchError, match=r"ranks 2 and 3 have the same CUDA device \(GPU-0\)") as caught:
        refuse_shared_devices(CUDA, gather)
    assert "LOCAL_RANK" in caught.value.remedy
    refuse_shared_devices(CUDA, lambda text: gather(text)[:3])


def test_two_ranks_on_one_device() -> None:
    results = run_ranks("shared_device_ranks.py", nproc=2)
    assert [result.returncode for result in results] == [0, 0], results[0].stderr
    first, second = (result.said for result in results)
    assert first == second
    assert (first["name"], first["backend"]) == ("gloo", "gloo")
    assert first["closed"] == [False, True]
    assert "ranks 0 and 1 have the same CUDA device (GPU-1), which NCCL refuses" in first["refusal"]
    assert "remedy: start at most as many ranks on a host as it has devices; or set" in first["refusal"]


def test_a_rank_that_waits_for_its_device_learns_of_the_failure_of_another() -> None:
    """As where a kernel waits for a rank that is gone: nothing on the device would ever tell."""
    first, second = run_ranks("device_wait_ranks.py", nproc=2)
    assert first.returncode == 0, first.stderr
    assert second.returncode == -9
    raised, killed = first.said["raise"], first.said["kill"]
    for said in (raised, killed):
        assert (said["type"], said["rank"], said["phase"]) == ("RankFailure", 1, "decode")
        assert said["seconds"] < 5  # well before the timeout
    assert "broken on purpose" in raised["cause"]
