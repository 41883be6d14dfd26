"""Chooses the all-reduce of a new group: all ranks compare what they can do, and take the same one."""

from __future__ import annotations

import json
from collections.abc import Callable

import torch

from inference_shardformer.distributed.all_reduce import AllReduce, AllReduceChoice, AllReduceRequest, Refusal
from inference_shardformer.distributed.segment import Segment
from inference_shardformer.distributed.shm import Place, ShmAllReduce, local_problem
from inference_shardformer.errors import EnvironmentMismatchError

Gather = Callable[[bytes], list[bytes]]


def choose_all_reduce(
    plain: AllReduce,
    gather: Gather,
    *,
    rank: int,
    device: torch.device,
    timeout_s: float,
    requested: AllReduceRequest,
    name: str,
) -> tuple[AllReduce, AllReduceChoice]:
    """Shared memory where all ranks can, else `plain`, that of the process group. All ranks call this together.

    `gather` hands every rank's message to all. Raises `EnvironmentMismatchError` on every rank when shared memory was
    asked for and cannot be had.
    """
    if requested == plain.name:
        return plain, AllReduceChoice(plain.name, requested)
    if requested not in ("auto", "shm"):
        raise EnvironmentMismatchError(
            f"shard.all_reduce={requested!r} cannot add up over these ranks, whose process group is {plain.name}",
            remedy=f"set shard.all_reduce to auto, shm or {plain.name}",
        )
    own = json.dumps([Place.here(), local_problem(device)])
    facts = [json.loads(each) for each in gather(own.encode())]
    reasons = ShmAllReduce.reasons(
        [Place(*place) for place, _ in facts], [problem and Refusal(*problem) for _, problem in facts]
    )
    if not reasons:
        segment, reasons = _share(gather, rank=rank, size=len(facts), name=name)
        if segment is not None:
            shm = ShmAllReduce(segment, rank=rank, size=len(facts), timeout_s=timeout_s, other=plain)
            return shm, AllReduceChoice(shm.name, requested)
    if requested == "shm":
        raise EnvironmentMismatchError(
            "the ranks cannot sum through shared memory: " + "; ".join(reason.message for reason in reasons),
            remedy="; ".join(dict.fromkeys(reason.remedy for reason in reasons)),
        )
    return plain, AllReduceChoice(plain.name, requested, ((ShmAllReduce.name, tuple(reasons)),))


def expected_all_reduce(requested: AllReduceRequest, size: int, device: torch.device) -> AllReduceChoice:
    """What so many ranks on this host would choose, as far as one process can tell."""
    if size == 1:
        return AllReduceChoice("none", requested)
    plain = "gloo" if device.type == "cpu" else "nccl"
    problem = local_problem(device)
    if requested not in ("auto", "shm"):
        return AllReduceChoice(requested, requested)
    if problem is None:
        return AllReduceChoice(ShmAllReduce.name, requested)
    return AllReduceChoice(plain, requested, ((ShmAllReduce.name, (problem,)),))


def _share(gather: Gather, *, rank: int, size: int, name: str) -> tuple[Segment | None, list[Refusal]]:
    """Memory that all ranks have mapped, in which each sees that the others live; else why not."""
    num_bytes = ShmAllReduce.num_bytes(size)
    segment: Segment | None = None
    error = ""
    try:
        if rank == 0:
            segment = Segment.create(name, num_bytes=num_bytes, rank=0)
    except OSError as exc:
        error = f"{num_bytes >> 20} MiB of shared memory cannot be had: {exc}"
    path, problem = json.loads(gather(json.dumps([segment.path if segment else "", error]).encode())[0])
    if problem:
        return None, [Refusal("memory", f"rank 0: {problem}", "raise the memory limit of the container or machine")]
    try:
        segment = segment or Segment.open(path, num_bytes=num_bytes, rank=rank)
    except OSError as exc:
        error = f"cannot map {path}: {exc}"
    problems = _gathered(gather, error)
    if not problems and segment is not None:
        problems = _gathered(gather, _blindness(segment, rank=rank, size=size))
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


def _gathered(gather: Gather, error: str) -> list[str]:
    texts = [each.decode() for each in gather(error.encode())]
    return [f"rank {rank}: {text}" for rank, text in enumerate(texts) if text]
