"""Machines that selection is tested on, with backends that declare what well-known libraries need.

`python tests/support/selection_profiles.py` writes the golden files anew; look at their diff before keeping them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch

from inference_shardformer.attention.base import (
    AttentionCapabilities,
    AttentionSpec,
    Feature,
    Reason,
    Requirement,
)
from inference_shardformer.attention.flash_attn import FlashAttnAttention
from inference_shardformer.attention.flash_attn4 import FlashAttn4Attention
from inference_shardformer.attention.flashinfer import FlashInferAttention
from inference_shardformer.attention.reference import ReferenceAttention
from inference_shardformer.attention.selector import judge
from inference_shardformer.attention.survey import Candidate, Survey, load_candidates, make_registry
from inference_shardformer.attention.triton import TritonAttention
from inference_shardformer.attention.varlen import VarlenAttention
from inference_shardformer.probing.facts import CpuFacts, DeviceFacts, HostFacts
from inference_shardformer.probing.requirement import ProbeResult

GOLDEN = Path(__file__).parents[1] / "golden" / "selection"
_HALF = (torch.float16, torch.bfloat16)
_EVERYTHING = frozenset(Feature) - {Feature.GRAPHS}


class XpuLike(ReferenceAttention):
    """As kernels of a plug-in for Intel devices."""

    name: ClassVar[str] = "xpu"
    capabilities = AttentionCapabilities(
        devices=("xpu",), dtypes=(torch.float32, *_HALF), features=_EVERYTHING - {Feature.SOFTCAP}
    )
    requires = (Requirement("xpu_kernels", "pip install xpu-kernels", platforms=("xpu",)),)


class AmxLike(ReferenceAttention):
    """As a native kernel for the matrix units of recent Xeons."""

    name: ClassVar[str] = "amx"
    capabilities = AttentionCapabilities(devices=("cpu",), dtypes=(torch.bfloat16,), features=_EVERYTHING)
    requires = (
        Requirement("amx_kernels", "pip install amx-kernels", platforms=("cpu",), isa=("amx_bf16", "amx_tile")),
    )


class VectorLike(ReferenceAttention):
    """As a native kernel for AVX-512."""

    name: ClassVar[str] = "vector"
    capabilities = AttentionCapabilities(devices=("cpu",), dtypes=(torch.float32, torch.bfloat16), features=_EVERYTHING)
    requires = (Requirement("vector_kernels", "pip install vector-kernels", platforms=("cpu",), isa=("avx512f",)),)


FAKES = (XpuLike, AmxLike, VectorLike)
# Those of ours that need a library.
OURS = (FlashAttnAttention, FlashAttn4Attention, FlashInferAttention, TritonAttention, VarlenAttention)
NEEDY = (*OURS, *FAKES)
LIBRARIES = {requirement.module: requirement for each in NEEDY for requirement in each.requires}


@dataclass(frozen=True)
class Profile:
    """A machine, what its libraries turned out to be (those not named are missing), and a spec beside the usual one.

    `native` is why it has no native kernels; by default it has them.
    """

    host: HostFacts
    device: str
    libraries: Mapping[str, ProbeResult] = field(default_factory=dict)
    spec: Mapping[str, Any] = field(default_factory=dict)
    native: Reason | None = None

    def attention_spec(self) -> AttentionSpec:
        """Eight key heads for thirty-two query heads of 128, in bf16 on accelerators and fp32 on a CPU."""
        usual: dict[str, Any] = {
            "num_heads": 32,
            "num_kv_heads": 8,
            "head_dim": 128,
            "scale": 128**-0.5,
            "dtype": torch.float32 if self.device == "cpu" else torch.bfloat16,
            "block_size": 16,
        }
        return AttentionSpec(device=torch.device(self.device), **usual | dict(self.spec))

    def survey(self) -> Survey:
        """What would be found there: our backends and the fakes, each library probed."""
        probes = {
            requirement: self.libraries.get(module, absent(requirement)) for module, requirement in LIBRARIES.items()
        }
        return Survey(self.host, candidates(), probes, self.native)

    def outcome(self) -> dict[str, Any]:
        """What selection makes of it: the winner of `auto`, and every candidate's reason codes in order."""
        verdicts = judge(self.attention_spec(), self.survey())
        winner = next((verdict.name for verdict in verdicts if not verdict.reasons), None)
        lines = [f"{v.name}: {' '.join(reason.code for reason in v.reasons) or 'serves'}" for v in verdicts]
        return {"auto": winner, "verdicts": lines}

    def to_json(self) -> str:
        """The profile and its outcome, as the golden file holds them."""
        spec = {name: str(value).removeprefix("torch.") for name, value in self.spec.items()}
        document = {
            "host": json.loads(self.host.to_json()),
            "device": self.device,
            "spec": spec,
            "libraries": {name: f"{each.status} {each.version}" for name, each in sorted(self.libraries.items())},
            "native_kernels": "ok" if self.native is None else self.native.code,
            **self.outcome(),
        }
        return json.dumps(document, indent=2) + "\n"


@cache
def candidates() -> tuple[Candidate, ...]:
    """Our own backends and the fakes, whatever is installed."""
    ours = [each for each in load_candidates(make_registry()) if each.origin.startswith("inference_shardformer.")]
    return (*ours, *(Candidate(fake.name, f"test:{fake.__name__}", fake) for fake in FAKES))


def absent(requirement: Requirement) -> ProbeResult:
    """What the probe of a library says that is not installed."""
    return ProbeResult(requirement.module, "missing", "", f"{requirement.package} is not installed", requirement.remedy)


def _host(cpu: CpuFacts, *accelerators: DeviceFacts) -> HostFacts:
    backends = ("gloo", "nccl") if any(device.platform in ("cuda", "rocm") for device in accelerators) else ("gloo",)
    return HostFacts(cpu, accelerators, torch="2.13.0", process_group_backends=backends)


def _working(*modules: str) -> dict[str, ProbeResult]:
    return {module: ProbeResult(module, "ok", "9.9") for module in modules}


def _failing(module: str, status: Any, version: str, detail: str) -> dict[str, ProbeResult]:
    return {module: ProbeResult(module, status, version, detail, LIBRARIES[module].remedy)}


HASWELL = CpuFacts("x86_64", "Intel Xeon E5-2680 v3", ("avx", "avx2", "f16c", "fma"))
SKYLAKE = CpuFacts("x86_64", "Intel Xeon Platinum 8168", ("avx", "avx2", "avx512bw", "avx512f", "avx512vl", "fma"))
SAPPHIRE = CpuFacts(
    "x86_64", "Intel Xeon Platinum 8480+", ("amx_bf16", "amx_int8", "amx_tile", "avx2", "avx512_bf16", "avx512f")
)
EPYC = CpuFacts("x86_64", "AMD EPYC 9654", ("avx2", "avx512_bf16", "avx512f", "avx512vl"))
GRAVITON = CpuFacts("aarch64", "Neoverse-V1", ("asimd", "asimdhp", "bf16", "i8mm", "sve"))
APPLE = CpuFacts("arm64", "arm")
V100 = DeviceFacts("cuda", "Tesla V100-SXM2-16GB", (7, 0), 16 << 30)
T4 = DeviceFacts("cuda", "Tesla T4", (7, 5), 15 << 30)
A100 = DeviceFacts("cuda", "NVIDIA A100-SXM4-80GB", (8, 0), 80 << 30)
RTX3090 = DeviceFacts("cuda", "NVIDIA GeForce RTX 3090", (8, 6), 24 << 30)
L40S = DeviceFacts("cuda", "NVIDIA L40S", (8, 9), 48 << 30)
H100 = DeviceFacts("cuda", "NVIDIA H100 80GB HBM3", (9, 0), 80 << 30)
B200 = DeviceFacts("cuda", "NVIDIA B200", (10, 0), 180 << 30)
RTX5090 = DeviceFacts("cuda", "NVIDIA GeForce RTX 5090", (12, 0), 32 << 30)
MI300X = DeviceFacts("rocm", "AMD Instinct MI300X", None, 192 << 30)
MAX1550 = DeviceFacts("xpu", "Intel Data Center GPU Max 1550", None, 64 << 30)

_VARLEN = "torch.nn.attention.varlen"
GPU_LIBRARIES = _working("flash_attn", "flash_attn.cute.interface", "flashinfer", "triton", _VARLEN)
CPU_LIBRARIES = _working("amx_kernels", "vector_kernels")
_NO_COMPILER = Reason("native_build", "the native CPU kernels could not be built: no C++ compiler", "install g++")
_PAGES = {"block_size": 256}
_BF16 = {"dtype": torch.bfloat16}

PROFILES: dict[str, Profile] = {
    "cpu_avx2": Profile(_host(HASWELL), "cpu", CPU_LIBRARIES),
    "cpu_avx512": Profile(_host(SKYLAKE), "cpu", CPU_LIBRARIES),
    "cpu_avx512_bare": Profile(_host(SKYLAKE), "cpu"),
    "cpu_amx_bf16": Profile(_host(SAPPHIRE), "cpu", CPU_LIBRARIES, _BF16),
    "cpu_amx_fp32": Profile(_host(SAPPHIRE), "cpu", CPU_LIBRARIES),
    "cpu_epyc_bf16": Profile(_host(EPYC), "cpu", CPU_LIBRARIES, _BF16),
    "cpu_aarch64": Profile(_host(GRAVITON), "cpu", CPU_LIBRARIES, _BF16),
    "cpu_without_native": Profile(_host(SKYLAKE), "cpu", CPU_LIBRARIES, native=_NO_COMPILER),
    "cpu_head_dim_512": Profile(_host(SAPPHIRE), "cpu", spec={"head_dim": 512}),
    "cpu_fp64": Profile(_host(SKYLAKE), "cpu", CPU_LIBRARIES, {"dtype": torch.float64}),
    "cpu_beside_a_gpu": Profile(_host(SAPPHIRE, H100), "cpu", GPU_LIBRARIES | CPU_LIBRARIES),
    "cuda_absent": Profile(_host(SKYLAKE), "cuda", GPU_LIBRARIES),
    "cuda_second_absent": Profile(_host(SKYLAKE, A100), "cuda:1", GPU_LIBRARIES),
    "cuda_sm70": Profile(_host(SKYLAKE, V100), "cuda", GPU_LIBRARIES, {"dtype": torch.float16}),
    "cuda_sm75": Profile(_host(SKYLAKE, T4), "cuda", GPU_LIBRARIES, {"dtype": torch.float16}),
    "cuda_sm80": Profile(_host(EPYC, A100), "cuda", GPU_LIBRARIES),
    "cuda_sm80_pages_of_256": Profile(_host(EPYC, A100), "cuda", GPU_LIBRARIES, _PAGES),
    "cuda_sm80_bare": Profile(_host(EPYC, A100), "cuda"),
    "cuda_sm80_fp32": Profile(_host(EPYC, A100), "cuda", GPU_LIBRARIES, {"dtype": torch.float32, **_PAGES}),
    "cuda_sm80_abi_mismatch": Profile(
        _host(EPYC, A100),
        "cuda",
        GPU_LIBRARIES
        | _failing("flash_attn", "abi_mismatch", "2.8.3", "its import raised ImportError: undefined symbol: _ZN3c105"),
        _PAGES,
    ),
    "cuda_sm80_too_old": Profile(
        _host(EPYC, A100),
        "cuda",
        GPU_LIBRARIES | _failing("triton", "too_old", "2.1.0", "triton 2.1.0 is older than 3.1"),
    ),
    "cuda_sm86_gqa_of_6": Profile(
        _host(SKYLAKE, RTX3090), "cuda", GPU_LIBRARIES, {"num_heads": 48, "num_kv_heads": 8, **_PAGES}
    ),
    "cuda_sm89": Profile(_host(EPYC, L40S), "cuda", GPU_LIBRARIES, _PAGES),
    "cuda_sm90": Profile(_host(SAPPHIRE, H100, H100), "cuda:1", GPU_LIBRARIES, _PAGES),
    "cuda_sm90_torch_alone": Profile(_host(SAPPHIRE, H100), "cuda", _working(_VARLEN), _PAGES),
    "cuda_sm90_old_torch": Profile(
        _host(SAPPHIRE, H100), "cuda", _failing(_VARLEN, "too_old", "2.9.1", "torch 2.9.1 is older than 2.13"), _PAGES
    ),
    "cuda_sm90_small_pages": Profile(_host(SAPPHIRE, H100), "cuda", GPU_LIBRARIES),
    "cuda_sm90_crash": Profile(
        _host(SAPPHIRE, H100),
        "cuda",
        GPU_LIBRARIES | _failing("flashinfer", "broken", "0.3", "its import crashed with SIGSEGV"),
    ),
    "cuda_sm90_softcap": Profile(_host(SAPPHIRE, H100), "cuda", GPU_LIBRARIES, {"softcap": 50.0, **_PAGES}),
    "cuda_sm90_odd_head_dim": Profile(_host(SAPPHIRE, H100), "cuda", GPU_LIBRARIES, {"head_dim": 100, **_PAGES}),
    "cuda_sm100": Profile(_host(SAPPHIRE, B200), "cuda", GPU_LIBRARIES, _PAGES),
    "cuda_sm120": Profile(_host(EPYC, RTX5090), "cuda", GPU_LIBRARIES),
    "cuda_mixed_generations": Profile(_host(EPYC, A100, T4), "cuda:1", GPU_LIBRARIES, _PAGES),
    "rocm": Profile(_host(EPYC, MI300X), "cuda", GPU_LIBRARIES, _PAGES),
    "rocm_bare": Profile(_host(EPYC, MI300X), "cuda"),
    "mps": Profile(_host(APPLE, DeviceFacts("mps", "arm")), "mps"),
    "xpu": Profile(_host(SAPPHIRE, MAX1550), "xpu", _working("xpu_kernels")),
    "xpu_bare": Profile(_host(SAPPHIRE, MAX1550), "xpu"),
}


def main() -> None:
    """Write every golden file, and remove those without a profile."""
    for stale in GOLDEN.glob("*.json"):
        stale.unlink()
    for name, profile in PROFILES.items():
        (GOLDEN / f"{name}.json").write_text(profile.to_json())
    print(f"{len(PROFILES)} profiles written to {GOLDEN}")


if __name__ == "__main__":
    main()
