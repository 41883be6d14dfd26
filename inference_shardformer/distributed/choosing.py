"""Chooses the all-reduce of a new group: all ranks compare what they can do, and take the same one."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import NamedTuple

import torch

from inference_shardformer.distributed import shm, symm_mem
from inference_shardformer.distributed.all_reduce import AllReduce, AllReduceChoice, AllReduceRequest, Refusal
from inference_shardformer.distributed.devices import Seat
from inference_shardformer.distributed.segment import Segment
from inference_shardformer.distributed.shm import Place, ShmAllReduce
from inference_shardformer.errors import EnvironmentMismatchError

Gather = Callable[[bytes], list[bytes]]


class Meeting(NamedTuple):
    """A new group whose ranks compare what they can do. `gather` hands every rank's message to all."""

    rank: int
    device: torch.device
    timeout_s: float
    gather: Gather
    name: str  # no other group has it
    known_as: str  # by this name torch knows the process group

    def texts(self, text: str) -> list[str]:
        """What each rank says."""
        return [each.decode() for each in self.gather(text.encode())]

    def problems(self, error: str) -> list[str]:
        """Every rank's error, by whom; nothing where none has one."""
        return [f"rank {rank}: {text}" for rank, text in enumerate(self.texts(error)) if text]


def choose_all_reduce(
    plain: AllReduce, meeting: Meeting, requested: AllReduceRequest
) -> tuple[AllReduce, AllReduceChoice]:
    """What sums fastest where all ranks can, else `plain`, that of the process group. All ranks call this together.

    That is shared memory on the CPU, and symmetric memory on CUDA devices. Raises `EnvironmentMismatchError` on every
    rank when one of them was asked for and cannot be had.
    """
    if requested == plain.name:
        return plain, AllReduceChoice(plain.name, requested)
    preferred = _preferred(meeting.device)
    wanted = preferred if requested == "auto" else requested
    if wanted not in _MAKERS:
        raise EnvironmentMismatchError(
            f"shard.all_reduce={requested!r} cannot add up over these ranks, whose process group is {plain.name}",
            remedy=f"set shard.all_reduce to auto, {preferred} or {plain.name}",
        )
    made, reasons = _MAKERS[wanted](plain, meeting)
    if made is not None:
        return made, AllReduceChoice(made.name, requested, scope=made.scope)
    if requested != "auto":
        raise EnvironmentMismatchError(
            f"the ranks cannot sum through {_MEMORY[wanted]} memory: " + "; ".join(each.message for each in reasons),
            remedy="; ".join(dict.fromkeys(reason.remedy for reason in reasons)),
        )
    return plain, AllReduceChoice(plain.name, requested, ((wanted, tuple(reasons)),))


def expected_all_reduce(requested: AllReduceRequest, size: int, device: torch.device) -> AllReduceChoice:
    """What so many ranks on this host would choose, as far as one process can tell."""
    if size == 1:
        return AllReduceChoice("none", requested)
    wanted = _preferred(device) if requested == "auto" else requested
    if wanted not in _MAKERS:
        return AllReduceChoice(wanted, requested)
    problem = shm.local_problem(device) if wanted == ShmAllReduce.name else symm_mem.local_problem(device)
    if problem is None:
        return AllReduceChoice(wanted, requested)
    return AllReduceChoice("gloo" if device.type == "cpu" else "nccl", requested, ((wanted, (problem,)),))


def _preferred(device: torch.device) -> str:
    return ShmAllReduce.name if device.type == "cpu" else symm_mem.NAME


def _make_shm(plain: AllReduce, meeting: Meeting) -> tuple[AllReduce | None, list[Refusal]]:
    """Sums through shared memory, or why not."""
    facts = [json.loads(each) for each in meeting.texts(json.dumps([Place.here(), shm.local_problem(meeting.device)]))]
    reasons = ShmAllReduce.reasons(
        [Place(*place) for place, _ in facts], [problem and Refusal(*problem) for _, problem in facts]
    )
    if reasons:
        return None, reasons
    segment, reasons = _share(meeting, size=len(facts))
    if segment is None:
        return None, reasons
    return ShmAllReduce(segment, rank=meeting.rank, size=len(facts), timeout_s=meeting.timeout_s, other=plain), []


def _make_symm_mem(plain: AllReduce, meeting: Meeting) -> tuple[AllReduce | None, list[Refusal]]:
    """Sums through symmetric memory that gave what those of `plain` give, or why not."""
    own = json.dumps([Seat.of(meeting.device), symm_mem.local_problem(meeting.device)])
    facts = [json.loads(each) for each in meeting.texts(own)]
    seats = [Seat(*seat) for seat, _ in facts]
    reasons = symm_mem.reasons(seats, [problem and Refusal(*problem) for _, problem in facts])
    if reasons:
        return None, reasons
    window: symm_mem.Window | None = None
    error = ""
    try:
        window = symm_mem.make_window(meeting.device, size=len(facts), group_name=meeting.known_as)
    except RuntimeError as exc:
        error = f"no symmetric memory can be had: {exc}"
    problems = meeting.problems(error)
    if not problems and window is not None:
        try:
            symm_mem.share(window)
        except RuntimeError as exc:
            error = f"symmetric memory cannot be shared: {exc}"
        problems = meeting.problems(error)
    if problems or window is None:
        return None, [Refusal("rendezvous", text, "leave shard.all_reduce at auto: nccl serves") for text in problems]
    sums = symm_mem.SymmMemAllReduce(window, plain)
    wrong = symm_mem.wrong_sum(sums, plain, meeting.device, rank=meeting.rank, timeout_s=meeting.timeout_s)
    problems = meeting.problems(wrong)
    return (None if problems else sums), [Refusal("wrong_sum", text, "report this; nccl serves") for text in problems]


_MAKERS = {ShmAllReduce.name: _make_shm, symm_mem.NAME: _make_symm_mem}
_MEMORY = {ShmAllReduce.name: "shared", symm_mem.NAME: "symmetric"}


def _share(meeting: Meeting, *, size: int) -> tuple[Segment | None, list[Refusal]]:
    """Memory that all ranks have mapped, in which each sees that the others live; else why not."""
    num_bytes, rank = ShmAllReduce.num_bytes(size), meeting.rank
    segment: Segment | None = None
    error = ""
    try:
        if rank == 0:
            segment = Segment.create(meeting.name, num_bytes=num_bytes, rank=0)
    except OSError as exc:
        error = f"{num_bytes >> 20} MiB of shared memory cannot be had: {exc}"
    path, problem = json.loads(meeting.texts(json.dumps([segment.path if segment else "", error]))[0])
    if problem:
        return None, [Refusal("memory", f"rank 0: {problem}", "raise the memory limit of the container or machine")]
    try:
        segment = segment or Segment.open(path, num_bytes=num_bytes, rank=rank)
    except OSError as exc:
        error = f"cannot map {path}: {exc}"
    problems = meeting.problems(error)
    if not problems and segment is not None:
        problems = meeting.problems(_blindness(segment, rank=rank, size=size))
    if problems:
        return None, [Refusal("mapping", text, "run all ranks in one container, as one user") for text in problems]
    return segment, []


def _blindness(segment: Segment, *, rank: int, size: int) -> str:
    """Why this rank could not tell that another one died; empty when it can."""
    try:
        unseen = [other for other in range(size) if other != rank and not segment.sees(other)]
    except OSError as exc:
        return f"file locks cannot be asked for: {exc}"
    return f"the locks of ranks {unseen} are not seen" if unseen else ""
