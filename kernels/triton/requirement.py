"""Which Triton the kernels need, as the facts of a `Requirement`. Imports no Triton."""

from __future__ import annotations

from typing import Literal, TypedDict

MIN_VERSION = "3.1"  # that of torch 2.5
MIN_CAPABILITY = (8, 0)  # what the kernels are compiled for in tests
_REMEDY = "pip install 'triton>=3.1' (the wheels of torch for CUDA bring the one that fits)"


class TritonFacts(TypedDict):
    """The keyword arguments of `probing.requirement.Requirement`."""

    module: str
    remedy: str
    min_version: str
    names: tuple[str, ...]
    platforms: tuple[Literal["cuda", "rocm"], ...]
    min_capability: tuple[int, int]


TRITON: TritonFacts = {
    "module": "triton",
    "remedy": _REMEDY,
    "min_version": MIN_VERSION,
    "names": ("jit", "compile", "language.dot"),
    "platforms": ("cuda", "rocm"),
    "min_capability": MIN_CAPABILITY,
}
