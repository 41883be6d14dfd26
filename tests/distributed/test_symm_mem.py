"""Sums through symmetric memory: which tensors it takes, when it is chosen, and every reason why it is not."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from symm_mem_standin import OPERATOR, SymmetricMemoryStandIn

from inference_shardformer.distributed import choosing, symm_mem
from inference_shardformer.distributed.all_reduce import AllReduce, AllReduceChoice, Refusal
from inference_shardformer.distributed.choosing import Meeting, choose_all_reduce, expected_all_reduce
from inference_shardformer.distributed.devices import Seat
from inference_shardformer.distributed.symm_mem import SymmMemAllReduce, Window, local_problem, reasons
from inference_shardformer.errors import EnvironmentMismatchError
from inference_shardformer.explaining.kernels import as_selection

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
SIZE = 2
HAS_OPERATOR = hasattr(torch.ops.symm_mem, OPERATOR)
needs_operator = pytest.mark.skipif(not HAS_OPERATOR, reason="this torch has no such sum, which is a refusal")


class Plain(AllReduce):
    """Sums of threads; `taken` lists the tensors."""

    name = "nccl"

    def __init__(self, ranks: Ranks, rank: int) -> None:
        self._ranks, self._rank = ranks, rank
        self.taken: list[torch.Size] = []

    def __call__(self, t: torch.Tensor) -> None:
        self.taken.append(t.shape)
        t.copy_(torch.stack(self._ranks.exchange(self._rank, t.clone())).double().sum(0).to(t.dtype))


class Ranks:
    """Threads that meet."""

    def __init__(self) -> None:
        self._mail: list[Any] = [None] * SIZE
        self._barrier = threading.Barrier(SIZE, timeout=60.0)

    def exchange(self, rank: int, item: Any) -> list[Any]:
        self._mail[rank] = item
        self._barrier.wait()
        items = list(self._mail)
        self._barrier.wait()
        return items

    def run(self, program: Any) -> list[Any]:
        """What each rank returned or raised."""
        results: list[Any] = [None] * SIZE

        def main(rank: int) -> None:
            try:
                results[rank] = program(rank)
            except Exception as exc:  # noqa: BLE001 - handed to the test
                results[rank] = exc

        threads = [threading.Thread(target=main, args=(rank,)) for rank in range(SIZE)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


@pytest.fixture
def ranks() -> Ranks:
    return Ranks()


@pytest.fixture
def memory(monkeypatch):
    standin = SymmetricMemoryStandIn(SIZE)
    monkeypatch.setattr(symm_mem, "local_problem", lambda device: None)
    monkeypatch.setattr(choosing, "_preferred", lambda device: "symm_mem")
    with standin.installed(monkeypatch):
        yield standin


def _choose(ranks: Ranks, memory: SymmetricMemoryStandIn, requested: str = "auto") -> list[Any]:
    def program(rank: int) -> Any:
        memory.at(rank)
        meeting = Meeting(rank, CPU, 1.0, lambda text: ranks.exchange(rank, text), "test", "its group")
        return choose_all_reduce(Plain(ranks, rank), meeting, requested)

    return ranks.run(program)


@needs_operator
class TestSums:
    @pytest.fixture
    def summed(self, ranks, memory):
        """Sums what `make(rank)` gives; every rank's tensor, and how many sums went to the process group."""

        def run(make: Any) -> tuple[list[torch.Tensor], int]:
            others = [Plain(ranks, rank) for rank in range(SIZE)]

            def program(rank: int) -> torch.Tensor:
                memory.at(rank)
                window = symm_mem.make_window(CPU, size=SIZE, group_name="g")
                symm_mem.share(window)
                t = make(rank)
                SymmMemAllReduce(window, others[rank])(t)
                return t

            results = ranks.run(program)
            assert all(isinstance(each, torch.Tensor) for each in results), results
            return results, len(others[0].taken)

        return run

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    @pytest.mark.parametrize("shape", [(8,), (1, 3, 64), (64, 4096)])
    def test_small_ones_of_types_that_the_kernel_adds(self, summed, memory, dtype, shape) -> None:
        make = lambda rank: torch.arange(torch.Size(shape).numel()).remainder(13).add(rank).to(dtype).view(shape)  # noqa: E731
        results, num_plain = summed(make)
        assert num_plain == 0
        assert memory.calls == [(dtype, torch.Size(shape).numel())]
        for result in results:
            assert torch.equal(result, make(0) + make(1))

    @pytest.mark.parametrize(
        "make",
        [
            lambda rank: torch.ones(8, dtype=torch.float16),
            lambda rank: torch.ones(8, dtype=torch.int64),
            lambda rank: torch.ones(7, dtype=torch.bfloat16),
            lambda rank: torch.ones(0),
            lambda rank: torch.ones((1 << 18) + 4),
        ],
        ids=["fp16", "int64", "no multiple of 16 bytes", "nothing", "more than the window"],
    )
    def test_all_others_go_to_the_process_group(self, summed, memory, make) -> None:
        results, num_plain = summed(make)
        assert (num_plain, memory.calls) == (1, [])
        assert all(torch.equal(result, 2 * make(0)) for result in results)

    @pytest.mark.parametrize(
        "make",
        [lambda rank: torch.arange(32.0).view(4, 8).T, lambda rank: torch.arange(33.0)[1:], lambda rank: torch.ones(8)],
        ids=["transposed", "shifted", "plain"],
    )
    def test_where_a_tensor_lies_does_not_decide(self, summed, memory, make) -> None:
        """Ranks must take the same way, so only size and type may."""
        results, num_plain = summed(make)
        assert num_plain == 0
        assert all(torch.equal(result, 2 * make(0)) for result in results)

    def test_one_after_another(self, ranks, memory) -> None:
        def program(rank: int) -> list[float]:
            memory.at(rank)
            window = symm_mem.make_window(CPU, size=SIZE, group_name="g")
            symm_mem.share(window)
            sums = SymmMemAllReduce(window, Plain(ranks, rank))
            found = []
            for count in (4096, 8, 64):
                t = torch.full((count,), float(rank + count))
                sums(t)
                found.append(t.unique().item())
            return found

        assert ranks.run(program) == [[8193.0, 17.0, 129.0]] * SIZE


@needs_operator
class TestChoosing:
    @pytest.mark.parametrize("requested", ["auto", "symm_mem"])
    def test_it_is_chosen_once_it_gave_what_the_process_group_gives(self, ranks, memory, requested) -> None:
        for sums, choice in _choose(ranks, memory, requested):
            assert (sums.name, choice.name, choice.requested, choice.refused) == ("symm_mem", "symm_mem", requested, ())
            assert choice.reason == "bf16 and fp32 of up to 1024 KiB at once; nccl adds up the rest"
        assert {dtype for dtype, _ in memory.calls} == {torch.bfloat16, torch.float32}

    def test_a_wrong_sum_is_a_refusal_on_every_rank(self, ranks, memory) -> None:
        memory.spoil = lambda total: total[-1:].add_(1)
        (first, second) = _choose(ranks, memory)
        assert first[1] == second[1]
        assert first[0].name == "nccl"
        ((name, refused),) = first[1].refused
        assert (name, {each.code for each in refused}) == ("symm_mem", {"wrong_sum"})
        assert refused[0].message == "rank 0: 1 of 8 sums of torch.bfloat16 are not those of nccl"
        assert as_selection(first[1]).verdicts[0].reasons[0].code == "wrong_sum"

    def test_a_rank_that_cannot_map_is_a_refusal_on_every_rank(self, ranks, memory) -> None:
        memory.cannot_map = {1}
        for sums, choice in _choose(ranks, memory):
            assert sums.name == choice.name == "nccl"
            ((_, (reason,)),) = choice.refused
            assert (reason.code, reason.message) == (
                "rendezvous",
                "rank 1: symmetric memory cannot be shared: CUDA driver error: invalid argument",
            )

    def test_asked_for_by_name_it_is_used_or_refused(self, ranks, memory) -> None:
        memory.cannot_map = {0}
        for error in _choose(ranks, memory, "symm_mem"):
            assert isinstance(error, EnvironmentMismatchError)
            assert "the ranks cannot sum through symmetric memory: rank 0: " in str(error)
            assert "leave shard.all_reduce at auto" in str(error)

    def test_a_sum_that_never_ends_is_an_error(self, monkeypatch) -> None:
        waiting = SimpleNamespace(record=lambda stream: None, query=lambda: False)
        monkeypatch.setattr(torch.cuda, "Event", lambda: waiting)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
        with pytest.raises(EnvironmentMismatchError, match=r"did not come to an end within 0\.01 s") as caught:
            symm_mem._await(CUDA, 0.01)
        assert "shard.all_reduce=nccl" in str(caught.value.remedy)


class TestRefusals:
    """What this machine, which has no CUDA device, and what others answer."""

    def test_tensors_on_the_cpu(self) -> None:
        assert local_problem(CPU).code == "device"
        meeting = Meeting(0, CPU, 1.0, lambda text: [text, text], "test", "0")
        with pytest.raises(EnvironmentMismatchError, match="symmetric memory is for CUDA devices"):
            choose_all_reduce(SimpleNamespace(name="gloo"), meeting, "symm_mem")

    def test_memory_that_torch_does_not_have_here(self) -> None:
        with pytest.raises((RuntimeError, AttributeError)):
            symm_mem.make_window(CPU, size=2, group_name="0")

    def test_a_torch_that_is_too_old(self, monkeypatch) -> None:
        assert (local_problem(CUDA) is None) == HAS_OPERATOR
        monkeypatch.setattr(symm_mem, "_OPERATOR", "not_yet_there")
        problem = local_problem(CUDA)
        assert problem.code == "torch"
        assert f"torch {torch.__version__} has no symm_mem::not_yet_there" in problem.message
        assert expected_all_reduce("auto", 2, CUDA).name == "nccl"

    def test_what_is_expected_of_a_cuda_host(self) -> None:
        expected = expected_all_reduce("auto", 2, CUDA)
        assert expected.name == ("symm_mem" if HAS_OPERATOR else "nccl")
        assert expected_all_reduce("gloo", 2, CUDA) == AllReduceChoice("gloo", "gloo")
        assert expected_all_reduce("shm", 2, CUDA).refused[0][1][0].code == "device"
        assert expected_all_reduce("auto", 1, CUDA).name == "none"

    SEATS = (Seat("h", "a", ("b",), ("b",)), Seat("h", "b", ("a",), ("a",)))

    def test_none(self) -> None:
        assert reasons(list(self.SEATS), [None, None]) == []
        masked = [seat._replace(visible=(), reachable=()) for seat in self.SEATS]  # each sees its own device alone
        assert reasons(masked, [None, None]) == []

    @pytest.mark.parametrize(
        ("seats", "code", "said"),
        [
            ([SEATS[0], SEATS[1]._replace(host="i")], "hosts", "ranks 0 and 1 run on different hosts"),
            ([SEATS[0], SEATS[0]], "shared_device", "ranks 0 and 1 have the same CUDA device"),
            ([SEATS[0]._replace(reachable=()), SEATS[1]], "peer_access", "rank 0 cannot access those of ranks [1]"),
            ([Seat("h", str(i)) for i in range(9)], "ranks", "9 ranks are more than 8"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_where_the_ranks_are(self, seats, code, said) -> None:
        (reason,) = reasons(seats, [None] * len(seats))
        assert reason.code == code
        assert said in reason.message
        assert reason.remedy

    def test_a_rank_that_lacks_something(self) -> None:
        found = reasons(list(self.SEATS), [None, Refusal("torch", "too old", "update")])
        assert found == [Refusal("torch", "rank 1: too old", "update")]


@pytest.mark.parametrize("is_idle", [True, False])
def test_a_window_that_a_kernel_waits_in_is_not_given_back(monkeypatch, is_idle: bool) -> None:
    kept: list[object] = []
    monkeypatch.setattr(symm_mem, "_KEPT", kept)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(query=lambda: is_idle))
    memory = SimpleNamespace(is_cuda=True, device=CUDA, numel=lambda: 1 << 18)
    SymmMemAllReduce(Window(memory, "g"), SimpleNamespace(name="nccl")).close()
    assert kept == ([] if is_idle else [memory])


@needs_operator
def test_the_operator_takes_what_is_given_to_it() -> None:
    schema = getattr(torch.ops.symm_mem, OPERATOR).default._schema
    assert [argument.name for argument in schema.arguments] == [
        "symm_buffer",
        "local_input",
        "reduce_op",
        "group_name",
        "out",
    ]
