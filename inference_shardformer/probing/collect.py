"""Gathers the facts of this machine, once for each process."""

from __future__ import annotations

import platform
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import torch.distributed as dist

from inference_shardformer.probing.facts import CpuFacts, DeviceFacts, HostFacts

_CPUINFO = Path("/proc/cpuinfo")
# Instruction sets that kernels are written for, by the names that Linux gives them on x86-64 and aarch64.
_X86 = ("avx", "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni")
_X86_TYPES = ("avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8", "amx_fp16")
_ARM = ("asimd", "asimdhp", "asimddp", "bf16", "i8mm", "sve", "sve2", "svebf16", "sme")
_ISA = {*_X86, *_X86_TYPES, *_ARM}


@cache
def collect_facts(*, with_accelerators: bool = True) -> HostFacts:
    """The facts of this machine. Without accelerators no driver is touched, as suits a run on the CPU."""
    return HostFacts(
        cpu=read_cpu(_CPUINFO),
        accelerators=_accelerators() if with_accelerators else (),
        torch=torch.__version__,
        triton=_installed_version("triton"),
        process_group_backends=_process_group_backends(),
    )


def read_cpu(cpuinfo: Path) -> CpuFacts:
    """The processor as Linux describes it in the first block of `cpuinfo`; elsewhere only its architecture."""
    fields: dict[str, str] = {}
    if cpuinfo.exists():
        block = cpuinfo.read_text(encoding="utf-8", errors="replace").strip().split("\n\n")[0]
        fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in block.splitlines())}
    flags = fields.get("flags", fields.get("Features", "")).split()
    name = fields.get("model name") or platform.processor() or "unknown"
    return CpuFacts(platform.machine(), name, tuple(sorted(_ISA & set(flags))))


def _accelerators() -> tuple[DeviceFacts, ...]:
    return (*_cuda_devices(), *_xpu_devices(), *_mps_device())


def _cuda_devices() -> tuple[DeviceFacts, ...]:
    if not torch.cuda.is_available():
        return ()
    is_rocm = torch.version.hip is not None
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = None if is_rocm else (properties.major, properties.minor)
        found.append(
            DeviceFacts("rocm" if is_rocm else "cuda", properties.name, capability, int(properties.total_memory))
        )
    return tuple(found)


def _xpu_devices() -> tuple[DeviceFacts, ...]:
    if not torch.xpu.is_available():
        return ()
    properties = [torch.xpu.get_device_properties(index) for index in range(torch.xpu.device_count())]
    return tuple(DeviceFacts("xpu", each.name, None, int(each.total_memory)) for each in properties)


def _mps_device() -> tuple[DeviceFacts, ...]:
    return (DeviceFacts("mps", platform.processor()),) if torch.backends.mps.is_available() else ()


def _process_group_backends() -> tuple[str, ...]:
    if not dist.is_available():
        return ()
    present = {"gloo": dist.is_gloo_available(), "mpi": dist.is_mpi_available(), "nccl": dist.is_nccl_available()}
    return tuple(name for name, is_present in present.items() if is_present)


def _installed_version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
