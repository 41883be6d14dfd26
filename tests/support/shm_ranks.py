"""Ranks of a shared-memory all-reduce test: sums against their definition, and faults; prints what happened."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from guard_ranks import attempt, described

from inference_shardformer.distributed.guard import RankGuard
from inference_shardformer.distributed.shm import BUFFER_BYTES
from inference_shardformer.distributed.tensor_parallel import TensorParallelGroup
from inference_shardformer.kernels.cpu import library

RANK = int(os.environ["RANK"])
CPU = torch.device("cpu")
# one element, a vector and a bit, one-shot, shared, several threads, several buffers
COUNTS = (1, 19, 576, 20_000, 70_001, BUFFER_BYTES // 4 + 3, 3 * BUFFER_BYTES // 4)


def group_of(all_reduce: str = "shm", *, timeout_s: float = 20.0) -> TensorParallelGroup:
    return TensorParallelGroup.from_process_group(
        dist.group.WORLD, device=CPU, timeout_s=timeout_s, all_reduce=all_reduce
    )


def held_by(rank: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    """What a rank brings: noise of a size of its own, so that sums must round and their order shows."""
    noise = torch.randn(count, generator=torch.Generator().manual_seed(1000 * rank + count % 997))
    return (noise * 10.0 ** (rank % 3)).to(dtype)


def in_order(parts: list[torch.Tensor]) -> torch.Tensor:
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part.float()
    return total.to(parts[0].dtype)


def sums(group: TensorParallelGroup) -> dict[str, Any]:
    digest = hashlib.sha256()
    wrong = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for count in COUNTS:
            everyone = [held_by(rank, count, dtype) for rank in range(group.size)]
            t = everyone[group.rank].clone()
            assert group.all_reduce(t) is t
            digest.update(t.view(torch.uint8).numpy().tobytes())
            if not torch.equal(t, in_order(everyone)):
                wrong.append(f"{dtype} {count}")
    column = torch.arange(12.0).view(3, 4).T
    group.all_reduce(column)
    if not torch.equal(column, torch.arange(12.0).view(3, 4).T * group.size):
        wrong.append("transposed")
    for dtype in (torch.int64, torch.float64):
        if group.all_reduce(torch.tensor([2**40 + RANK]).to(dtype)).item() != sum(
            2**40 + rank for rank in range(group.size)
        ):
            wrong.append(str(dtype))
    if group.all_reduce(torch.empty(0)).numel():
        wrong.append("empty")
    return {"wrong": wrong, "digest": digest.hexdigest()}


def mixed(group: TensorParallelGroup, *, num_steps: int = 300) -> list[str]:
    """Collectives of every kind and size in one random order, each rank at a pace of its own."""
    order, pace = random.Random(7), random.Random(100 + group.rank)
    wrong = []
    for step in range(num_steps):
        kind, count = order.choice(("sum", "gather", "broadcast", "bytes")), order.choice((1, 100, 20_000, 150_001))
        src = order.randrange(group.size)
        parts = [torch.full((count,), float(step + 1000 * rank)) for rank in range(group.size)]
        mine = parts[group.rank].clone()
        if pace.random() < 0.1:
            time.sleep(pace.random() * 0.003)
        match kind:
            case "sum":
                is_right = torch.equal(group.all_reduce(mine), in_order(parts))
            case "gather":
                is_right = torch.equal(group.all_gather(mine, dim=0), torch.cat(parts))
            case "broadcast":
                is_right = torch.equal(group.broadcast(mine, src=src), parts[src])
            case _:
                text = str(step).encode() * count
                is_right = group.broadcast_bytes(text if group.rank == src else None, src=src) == text
        if not is_right:
            wrong.append(f"step {step}: {kind} of {count} from {src}")
    return wrong


def against_gloo(group: TensorParallelGroup) -> dict[str, Any]:
    """Sums of the same tensors by gloo: equal between two ranks in fp32, else apart by what gloo's roundings allow."""
    gloo = group_of("gloo")
    worst = {}
    for dtype in (torch.float32, torch.bfloat16):
        mine = held_by(group.rank, 5000, dtype)
        ours, theirs = group.all_reduce(mine.clone()), gloo.all_reduce(mine.clone())
        bound = sum(held_by(rank, 5000, dtype).abs().double() for rank in range(group.size)) * torch.finfo(dtype).eps
        worst[str(dtype)] = ((ours.double() - theirs.double()).abs() / bound).max().item()
    gloo.close()
    return {"worst": worst, "choice": gloo.all_reduce_choice.name}


def refused_by_auto() -> dict[str, Any]:
    group = group_of("auto")
    total = group.all_reduce(torch.ones(3)).tolist()
    choice = group.all_reduce_choice
    return {"name": choice.name, "refused": choice.refused, "total": total}


def kill_in_the_middle() -> dict[str, Any]:
    """The last rank dies while the others wait for it in a sum, under a guard."""
    group = group_of(timeout_s=20)
    guard = RankGuard(group, timeout_s=20)

    def steps() -> None:
        with guard.step("decode"):
            group.all_reduce(torch.ones(5))
            if group.rank == group.size - 1:
                time.sleep(0.5)  # the others sleep in the sum by now
                os.kill(os.getpid(), signal.SIGKILL)
            group.all_reduce(torch.ones(5))

    said = attempt(steps)
    guard.close()
    return said


def unguarded(kind: str) -> dict[str, Any]:
    """What rank 0 raises when rank 1 leaves it waiting and nobody guards."""
    group = group_of(timeout_s=1.5 if kind == "late" else 30)
    group.all_reduce(torch.ones(5))
    began = time.monotonic()
    if group.rank == 1:
        time.sleep(0.3)
        match kind:
            case "close":
                group.close()
            case "late":
                time.sleep(4.0)
            case "abort":
                threading.Timer(0.3, group.abort).start()  # while this rank itself waits for the other
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "abort":
        time.sleep(6.0)
    said = {}
    try:
        group.all_reduce(torch.ones(6 if kind == "other" and group.rank == 1 else 5))
    except RuntimeError as exc:
        said = described(exc)
    return said | {"seconds": time.monotonic() - began}


def main() -> None:
    dist.init_process_group("gloo")
    said: dict[str, Any]
    match sys.argv[1:]:
        case ["sums", threads]:
            torch.set_num_threads(int(threads))
            group = group_of()
            said = {"sums": sums(group), "gloo": against_gloo(group), "choice": group.all_reduce_choice.name}
            said["mixed"] = mixed(group)
            before = len(os.listdir("/proc/self/fd"))
            group_of().close()
            said["fds"] = len(os.listdir("/proc/self/fd")) - before
            said["unguarded"] = {kind: unguarded(kind) for kind in ("close", "late", "other", "abort")}
        case ["kill"]:
            said = kill_in_the_middle()
        case ["kill unguarded"]:
            said = unguarded("kill")
        case ["refused"]:
            if RANK == 1:  # a rank on which the kernels were never built
                library.FOLDER = Path("/nonexistent")
            said = {"asked": attempt(group_of), "auto": refused_by_auto()}
    print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main()
