"""What a rank can say of its process and machine without asking for a device."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

from inference_shardformer.doctor.report import Memory, NativeReport, ReasonReport
from inference_shardformer.kernels.cpu.library import native_status

_CGROUP = Path("/sys/fs/cgroup")
_MAPS = Path("/proc/self/maps")
_OPENMP = re.compile(r"/(lib(?:g|i)?omp5?(?:-[0-9a-f]+)?\.(?:so|dylib)[.\d]*)$")
_DISTRIBUTIONS = ("inference-shardformer", "torch", "transformers", "safetensors", "triton", "pydantic", "psutil")
_TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_OTHERS = (
    *("OMP_NUM_THREADS", "MKL_NUM_THREADS", "KMP_AFFINITY", "GOMP_CPU_AFFINITY", "OMP_PROC_BIND", "LD_PRELOAD"),
    *("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ZE_AFFINITY_MASK", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"),
)


def versions() -> dict[str, str | None]:
    """Python and the distributions that matter; `None` for one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in _DISTRIBUTIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables of the launcher, of threads and devices, and our own, as far as they are set."""
    ours = sorted(name for name in environ if name.startswith("INFERENCE_SHARDFORMER_"))
    return {name: environ[name] for name in (*_TORCHRUN, *_OTHERS, *ours) if environ.get(name)}


def num_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def core_quota(folder: Path = _CGROUP) -> float | None:
    """The limit of the control group (v2) in cores; `None` without one."""
    try:
        quota, period = (folder / "cpu.max").read_text().split()
    except (OSError, ValueError):
        return None
    return None if quota == "max" else int(quota) / int(period)


def memory(folder: Path = _CGROUP) -> Memory:
    """Main memory and the limit of the control group (v2)."""
    seen = psutil.virtual_memory()
    try:
        text = (folder / "memory.max").read_text().strip()
    except OSError:
        text = "max"
    return Memory(int(seen.total), int(seen.available), None if text == "max" else int(text))


def native_kernels() -> NativeReport:
    """The library of native CPU kernels, loaded if it can be."""
    status = native_status()
    problem = None if status.problem is None else ReasonReport(*status.problem)
    return NativeReport(status.path, status.isa_level, status.isa_levels, status.is_stale, problem)


def openmp_runtimes(maps: Path = _MAPS) -> tuple[str, ...]:
    """Paths of the OpenMP runtimes that are loaded into this process. Each brings threads of its own."""
    if not maps.exists():
        return ()
    paths = {
        line.split(maxsplit=5)[5] for line in maps.read_text().splitlines() if line.count(" ") >= 5 and "/" in line
    }
    return tuple(sorted(path for path in paths if _OPENMP.search(path)))
