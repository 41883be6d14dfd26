"""Ranks of a guard test: many cases one after another, each on groups and guards of its own; prints what was raised."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from inference_shardformer.distributed.guard import RankGuard
from inference_shardformer.distributed.tensor_parallel import TensorParallelGroup
from inference_shardformer.errors import CapacityError, InferenceShardformerError, PolicyError, RankFailure

RANK = int(os.environ["RANK"])
CPU = torch.device("cpu")


def described(exc: BaseException) -> dict[str, Any]:
    text = {"type": type(exc).__name__, "text": str(exc), "origin": type(exc.__cause__).__name__}
    if isinstance(exc, RankFailure):
        text |= {"rank": exc.rank, "phase": exc.phase, "cause": exc.cause, "cause_code": exc.cause_code}
    return text


def attempt(fn: Callable[[], Any]) -> Any:
    began = time.monotonic()
    try:
        value = fn()
    except (InferenceShardformerError, KeyboardInterrupt) as exc:
        return {**described(exc), "seconds": time.monotonic() - began}
    return {"value": value}


def raising(exc: Exception, *, on: tuple[int, ...]) -> Callable[[], int]:
    def fn() -> int:
        if RANK in on:
            raise exc
        return RANK

    return fn


def steps(group: TensorParallelGroup, guard: RankGuard, *, num_steps: int, fault: Callable[[int], None]) -> None:
    for step in range(num_steps):
        with guard.step("prefill" if step == 0 else "decode"):
            group.all_reduce(torch.ones(8))
            fault(step)
            group.all_reduce(torch.ones(8))


def phases() -> dict[str, Any]:
    group = TensorParallelGroup.from_process_group(dist.group.WORLD, device=CPU, timeout_s=20)
    guard = RankGuard(group, timeout_s=20)
    everyone = tuple(range(group.size))
    said = {
        "well": attempt(lambda: guard.together("load", lambda: RANK * 10)),
        "typed": attempt(lambda: guard.together("load", raising(PolicyError("bad head", remedy="mend it"), on=(1,)))),
        "alike": attempt(lambda: guard.together("load", raising(CapacityError("no room"), on=everyone))),
        "plain": attempt(lambda: guard.together("load", raising(KeyError("lm_head"), on=(1,)))),
        "agreed": attempt(lambda: guard.agree("resolve", {"dtype": "bf16"})),
        "differ": attempt(lambda: guard.agree("resolve", {"dtype": "bf16" if RANK else "fp32", f"only{RANK}": "x"})),
        "after": attempt(lambda: guard.together("load", lambda: "still fine")),
    }
    said["step_us"] = min(_seconds_of(guard, num_steps=200) for _ in range(20)) / 200 * 1e6
    guard.close()
    guard.close()
    said["closed"] = attempt(lambda: guard.together("load", lambda: 1))
    group.all_reduce(torch.ones(1))
    return said


def _seconds_of(guard: RankGuard, *, num_steps: int) -> float:
    began = time.perf_counter()
    for _ in range(num_steps):
        with guard.step("decode"):
            pass
    return time.perf_counter() - began


def typed_in_step() -> dict[str, Any]:
    """A failure inside a step ends the group for good, and leaves the world and a second engine alone."""
    first = TensorParallelGroup.from_process_group(dist.group.WORLD, device=CPU, timeout_s=20)
    second = TensorParallelGroup.from_process_group(dist.group.WORLD, device=CPU, timeout_s=20)
    guard, other = RankGuard(first, timeout_s=20), RankGuard(second, timeout_s=20)

    def fault(step: int) -> None:
        if RANK == 1 and step == 3:
            raise CapacityError("cache full", remedy="make room")

    said = {
        "step": attempt(lambda: steps(first, guard, num_steps=5, fault=fault)),
        "again": attempt(lambda: steps(first, guard, num_steps=1, fault=lambda step: None)),
        "other": attempt(lambda: steps(second, other, num_steps=5, fault=lambda step: None)),
    }
    world = torch.ones(1)
    dist.all_reduce(world)
    other.close()
    guard.close()
    return said | {"world": world.item()}


def fault_in_step(kind: str, culprit: int, *, world: dist.ProcessGroup, timeout_s: float = 1.5) -> Any:
    """A fault of one rank of `world` in its third step."""
    group = TensorParallelGroup.from_process_group(world, device=CPU, timeout_s=timeout_s)
    guard = RankGuard(group, timeout_s=timeout_s)

    def fault(step: int) -> None:
        if group.rank != culprit or step != 2:
            return
        match kind:
            case "raise":
                raise ValueError("broken on purpose")
            case "interrupt":
                raise KeyboardInterrupt
            case "leave":
                guard.close()
                raise KeyboardInterrupt
            case "sleep":
                time.sleep(timeout_s + 2)
            case "stop":
                with subprocess.Popen(["sh", "-c", f"sleep {timeout_s + 3}; kill -CONT {os.getpid()}"]):
                    os.kill(os.getpid(), signal.SIGSTOP)
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)

    said = attempt(lambda: steps(group, guard, num_steps=4, fault=fault))
    guard.close()
    return said


def forked() -> dict[str, Any]:
    """What a process can do that is forked from a rank, and what it leaves of the rank's group by closing its copy."""
    group = TensorParallelGroup.from_process_group(dist.group.WORLD, device=CPU, timeout_s=20)
    guard = RankGuard(group, timeout_s=20)
    read, write = os.pipe()
    if os.fork() == 0:
        said = attempt(lambda: steps(group, guard, num_steps=1, fault=lambda step: None))
        guard.close()
        group.close()
        os.write(write, json.dumps(said).encode())
        os._exit(0)
    os.wait()
    said = {"child": json.loads(os.read(read, 65536)), "parent": {}}
    said["parent"] = attempt(lambda: steps(group, guard, num_steps=2, fault=lambda step: None))
    guard.close()
    group.close()
    return said


def stall_in_phase() -> Any:
    """A rank that never finishes loading, and one that is merely slower than the other."""
    group = TensorParallelGroup.from_process_group(dist.group.WORLD, device=CPU, timeout_s=20)
    guard = RankGuard(group, timeout_s=2.0)
    slow = attempt(lambda: guard.together("load", lambda: time.sleep(2.5 if RANK else 2.0)))
    stalled = attempt(lambda: guard.together("load", lambda: time.sleep(6.0 if RANK else 0.0)))
    guard.close()
    return {"slow": slow, "stalled": stalled}


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    everyone = dist.group.WORLD
    match sys.argv[1:]:
        case ["phases"]:
            said = {"phases": phases(), "step": typed_in_step(), "stall": stall_in_phase(), "forked": forked()}
        case ["faults", *faults]:
            said = {}
            for fault in faults:
                kind, culprit = fault.split(",")
                said[fault] = fault_in_step(kind, int(culprit), world=everyone)
        case ["four"]:
            print(json.dumps(fault_in_step("raise", 2, world=everyone)), flush=True)
            pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
            said = fault_in_step("kill", 1 - RANK // 2, world=pairs[RANK // 2])
    print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main()
