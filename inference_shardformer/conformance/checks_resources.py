"""Checks on what a backend costs beside its work: memory that grows, global state of torch, work at import."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from inspect import getsourcefile
from typing import NamedTuple

import psutil
import torch

from inference_shardformer.attention.base import AttentionBackend
from inference_shardformer.conformance.check import Check, Notes, Subject, Trial
from inference_shardformer.conformance.problem import Problem
from inference_shardformer.conformance.samples import main_case
from inference_shardformer.conformance.verdicts import ConformanceSkip, require

NUM_STEPS = 24
MAX_HEAP_PER_STEP = 2048  # bytes; free lists of the interpreter make smaller numbers meaningless
MAX_GROWTH = 32 << 20  # bytes of the process or the device over all steps: what allocators may hold back
IMPORT_LIMIT_S = 2.0  # processor time of an import, beyond torch and this package


class _Held(NamedTuple):
    tensors: int
    objects: int  # that the garbage collector knows
    heap: int
    process: int
    device: int


def _flat_memory(subject: Subject) -> Iterator[Trial]:
    yield Trial(f"{NUM_STEPS}_steps", partial(_require_flat, subject))


def _require_flat(subject: Subject) -> Notes:
    __tracebackhide__ = True
    case = main_case(subject.declared)
    backend, problem = subject.build(case), subject.problem(case)
    tracemalloc.start()
    try:
        _run_steps(backend, problem, 4)  # caches may fill
        _held(subject.device)  # and so may those of the measurement
        before = _held(subject.device)
        _run_steps(backend, problem, NUM_STEPS)
        after = _held(subject.device)
    finally:
        tracemalloc.stop()
    tensors, objects, heap, process, device = (new - old for new, old in zip(after, before, strict=True))
    require(tensors <= 0, f"{tensors} tensors more are alive after {NUM_STEPS} steps")
    require(objects < NUM_STEPS // 2, f"{objects} objects more are alive after {NUM_STEPS} steps")
    require(heap <= NUM_STEPS * MAX_HEAP_PER_STEP, f"{heap} bytes of the heap more are in use after {NUM_STEPS} steps")
    require(process <= MAX_GROWTH, f"the process holds {process} bytes more after {NUM_STEPS} steps")
    require(device <= 0, f"{device} bytes more of the device are in use after {NUM_STEPS} steps")
    return {"object_growth": objects, "heap_growth_bytes": heap, "process_growth_bytes": process}


def _run_steps(backend: AttentionBackend, problem: Problem, count: int) -> None:
    for _ in range(count):
        problem.step(backend)


def _held(device: torch.device) -> _Held:
    gc.collect()
    module = torch.get_device_module(device.type)
    on_device = module.memory_allocated(device) if hasattr(module, "memory_allocated") else 0
    objects = gc.get_objects()
    return _Held(
        tensors=sum(issubclass(type(each), torch.Tensor) for each in objects),
        objects=len(objects),
        heap=tracemalloc.get_traced_memory()[0],
        process=psutil.Process().memory_info().rss,
        device=on_device,
    )


def _global_state(subject: Subject) -> Iterator[Trial]:
    yield Trial("build_plan_write_attend", partial(_require_state_kept, subject))


def _state() -> dict[str, object]:
    """Settings of torch and of the process that belong to whoever runs the model."""
    return {
        "the random state": torch.get_rng_state().tolist(),
        "the number of threads": torch.get_num_threads(),
        "the default type": torch.get_default_dtype(),
        "whether gradients are recorded": torch.is_grad_enabled(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "the precision of fp32 products": torch.get_float32_matmul_precision(),
        "environment variables": dict(os.environ),
        "the working directory": os.getcwd(),
    }


@contextmanager
def _unusual_state() -> Iterator[None]:
    """Values that nobody sets, so that setting the usual ones shows."""
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0x5EED)
        torch.set_num_threads(threads + 1)
        torch.set_float32_matmul_precision("medium")
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            torch.set_float32_matmul_precision(precision)


def _require_state_kept(subject: Subject) -> Notes | None:
    __tracebackhide__ = True
    case = main_case(subject.declared)
    problem = subject.problem(case)
    with _unusual_state():
        before = _state()
        problem.step(subject.build(case))
        changed = [name for name, value in _state().items() if value != before[name]]
    require(not changed, f"it changed {', '.join(changed)}")
    return None


_INHERITED = ("PATH", "HOME", "TMPDIR", "LD_LIBRARY_PATH", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "CUDA_HOME")
_IMPORT = """
import os, sys, threading, time
import torch, inference_shardformer.attention.base
def state():
    return {
        "the random state": torch.get_rng_state().tolist(), "the number of threads": torch.get_num_threads(),
        "the default type": torch.get_default_dtype(), "environment variables": dict(os.environ),
        "running threads": threading.active_count(), "an initialised GPU": torch.cuda.is_initialized(),
    }
before, start = state(), time.process_time()
import importlib.util
name, path = sys.argv[1:]
try:
    importlib.import_module(name)
except ModuleNotFoundError:
    spec = importlib.util.spec_from_file_location("backend_under_test", path)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
seconds = time.process_time() - start
changed = [name for name, value in state().items() if value != before[name]]
print("conformance", seconds, ",".join(changed), sep="|")
"""


def _import(subject: Subject) -> Iterator[Trial]:
    yield Trial("in_a_new_process", partial(_require_idle_import, subject.backend))


def _require_idle_import(backend: type[AttentionBackend]) -> Notes:
    __tracebackhide__ = True
    path = getsourcefile(backend)
    if path is None:
        raise ConformanceSkip("the class has no source file that another process could import")
    flags = ["-B"] if sys.dont_write_bytecode else []
    command = [sys.executable, *flags, "-c", _IMPORT, backend.__module__, path]
    # What an earlier import in this process left in the environment must not hide what this one sets.
    environment = {name: value for name, value in os.environ.items() if name in _INHERITED}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=120)
    require(done.returncode == 0, f"importing {backend.__module__} alone fails: {done.stderr[-800:]}")
    printed, _, result = done.stdout.rpartition("conformance|")
    seconds, changed = result.strip().split("|")
    require(not printed and not done.stderr, f"importing its module prints: {(printed or done.stderr)[:200]!r}")
    require(not changed, f"importing its module changes {changed}")
    require(float(seconds) <= IMPORT_LIMIT_S, f"importing its module takes {seconds} s of processor time")
    return {"import_seconds": float(seconds)}


CHECKS = (
    Check("memory_stays_flat", "Steps leave nothing behind.", _flat_memory),
    Check("leaves_global_state_alone", "Settings of torch and of the process are kept.", _global_state),
    Check("import_does_no_work", "Importing the module is cheap and changes nothing.", _import, on_device=False),
)
