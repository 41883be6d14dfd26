"""TensorParallelGroup and the environment: collectives of four real ranks, sub-groups, and what is refused."""

from __future__ import annotations

import socket

import pytest
import torch
from ranks import free_port, run_ranks

from inference_shardformer.distributed import environment
from inference_shardformer.distributed.environment import RankEnvironment, ensure_process_group, process_group_for
from inference_shardformer.distributed.tensor_parallel import TensorParallelGroup, joining
from inference_shardformer.distributed.wire import Line, answer, call
from inference_shardformer.errors import EnvironmentMismatchError, StateError

CPU = torch.device("cpu")
LAUNCHED = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


def test_collectives_of_a_world_of_sub_groups_and_of_two_groups_at_once() -> None:
    results = run_ranks("group_ranks.py", nproc=4)
    assert [result.returncode for result in results] == [0] * 4, results[0].stderr
    said = [result.said for result in results]
    assert {one["message"] for one in said} == {
        "tp_size=2, but the default process group has 4 ranks; the two must be equal"
    }
    assert [one["sub"] for one in said] == [[0, 2], [0, 2], [1, 2], [1, 2]]
    assert [one["mesh"] for one in said] == [[0, 2], [1, 2], [0, 2], [1, 2]]
    assert [one["world"] for one in said] == [4.0] * 4


def test_one_rank_needs_no_process_group() -> None:
    group = TensorParallelGroup.single(CPU)
    t = torch.arange(6.0).view(2, 3)
    assert (group.rank, group.size, group.device) == (0, 1, CPU)
    assert group.all_reduce(t) is t
    assert group.all_gather(t) is t
    assert group.broadcast(t) is t
    assert group.broadcast_bytes(b"abc") == b"abc"
    assert group.all_gather_bytes(b"abc") == [b"abc"]
    group.barrier()
    group.abort()
    group.close()
    assert torch.equal(t, torch.arange(6.0).view(2, 3))


def test_environment_is_read_from_the_launcher() -> None:
    assert RankEnvironment.detect({}) == RankEnvironment(0, 1, 0, 1, is_torchrun=False)
    assert RankEnvironment.detect(LAUNCHED) == RankEnvironment(3, 8, 1, 8, is_torchrun=True)
    whole = RankEnvironment.detect({**LAUNCHED, "LOCAL_WORLD_SIZE": "2"})
    assert whole == RankEnvironment(3, 8, 1, 2, is_torchrun=True)


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "RANK, WORLD_SIZE are set, MASTER_ADDR, MASTER_PORT are not"),
        ({**LAUNCHED, "WORLD_SIZE": "two"}, "WORLD_SIZE='two' is not a count"),
        ({**LAUNCHED, "LOCAL_RANK": "-1"}, "LOCAL_RANK='-1' is not a count"),
        ({**LAUNCHED, "RANK": "8"}, "RANK=8 and WORLD_SIZE=8"),
        ({**LAUNCHED, "RANK": "0", "WORLD_SIZE": "0"}, "RANK=0 and WORLD_SIZE=0"),
        ({**LAUNCHED, "MASTER_PORT": "65536"}, "MASTER_PORT=65536 is no port"),
        ({**LAUNCHED, "MASTER_PORT": "http"}, "MASTER_PORT='http' is not a count"),
    ],
)
def test_broken_environment_is_refused(environ: dict[str, str], message: str) -> None:
    with pytest.raises(EnvironmentMismatchError, match=message):
        RankEnvironment.detect(environ)


def test_a_port_that_is_taken_and_ranks_that_never_come_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**LAUNCHED, "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(environment, "JOIN_TIMEOUT_S", 0.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("MASTER_PORT", str(server.getsockname()[1]))
        with pytest.raises(EnvironmentMismatchError, match=r"rank 0 of 8 did not meet the others at 127\.0\.0\.1:"):
            ensure_process_group(CPU, 5.0)
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    with pytest.raises(EnvironmentMismatchError, match="rank 0 of 8 did not meet the others") as caught:
        ensure_process_group(CPU, 1.0)
    assert "\n" not in caught.value.message


def test_without_a_launcher_there_is_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    assert not ensure_process_group(CPU, 10)
    assert process_group_for(1) is None
    assert process_group_for(None) is None
    with pytest.raises(EnvironmentMismatchError, match="tp_size=4, but this is a single process") as caught:
        process_group_for(4)
    assert "torchrun --nproc-per-node 4" in caught.value.remedy


def test_ranks_that_do_not_find_each_other_are_told_so() -> None:
    with pytest.raises(EnvironmentMismatchError, match="not every one of the 4 ranks joined") as caught:
        with joining(4):
            raise RuntimeError("wait timeout")
    assert isinstance(caught.value.__cause__, RuntimeError)
    with pytest.raises(StateError, match="as it was"):
        with joining(4):
            raise StateError("as it was")


def test_strangers_are_turned_away_and_missing_ranks_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        strangers = [socket.create_connection(("127.0.0.1", port)) for _ in range(4)]
        for stranger, greeting in zip(strangers, (b"GET / HTTP/1.1\n", b"7\n", b'["hello"]\n'), strict=False):
            stranger.sendall(greeting)
        strangers[3].sendall(b'["hello", "wrong", 1]\n')
        line = call(2, "127.0.0.1", port, token="secret", timeout_s=5.0)
        with pytest.raises(EnvironmentMismatchError, match=r"ranks \[1\] did not connect to rank 0 within 0\.2 s"):
            answer(server, size=3, token="secret", timeout_s=0.2)
        line.close()
        for stranger in strangers:
            assert stranger.recv(1) == b""
            stranger.close()


def test_a_rank_that_reports_before_it_is_answered_is_known_and_its_reports_are_kept() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        line = call(1, *server.getsockname(), token="secret", timeout_s=5.0)
        line.send("post", "answer/1/1", "early")
        lines = answer(server, size=2, token="secret", timeout_s=5.0)
    assert lines[1].receive() == [["post", "answer/1/1", "early"]]
    line.close()
    lines[1].close()


def test_an_unreachable_leader_is_named() -> None:
    with pytest.raises(EnvironmentMismatchError, match=r"rank 1 cannot reach rank 0 at 127\.0\.0\.1"):
        call(1, "127.0.0.1", free_port(), token="secret", timeout_s=1.0)


def test_messages_arrive_whole_however_they_are_cut() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        left = socket.create_connection(server.getsockname())
        line = Line(server.accept()[0])
    left.sendall(b'["a", 1]\n["b"')
    assert line.receive() == [["a", 1]]
    left.sendall(b", 2.5]\n")
    assert line.receive() == [["b", 2.5]]
    left.close()
    assert line.receive() is None
    line.send("nobody listens")
    line.close()
