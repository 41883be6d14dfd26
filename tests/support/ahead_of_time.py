"""Compiles Triton kernels for a device that is not there, and reads what the result takes of it."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
_STACK = re.compile(r"REG:(\d+) STACK:(\d+)")


class Resources(NamedTuple):
    """Of one thread or one program. Spilled registers lie on the stack, and so does nothing else in our kernels."""

    registers: int
    stack_bytes: int
    shared_bytes: int
    instructions: str  # "wgmma", "mma" or none


def compile_for(
    kernel: triton.JITFunction,
    types: Mapping[str, str],  # of run-time arguments, as Triton spells them
    constants: Mapping[str, int | float | bool],
    *,
    capability: int,
    folder: Path,
    **options: int,  # num_warps, num_stages
) -> Resources:
    """Compile to a cubin of `sm_<capability>`; pointers and strides count as multiples of 16, as models have them."""
    names = [param.name for param in kernel.params]
    assert set(types) | set(constants) == set(names), set(names) ^ (set(types) | set(constants))
    even = [name for name in types if types[name].startswith("*") or name.endswith("stride")]
    even = [name for name in even if name not in ("table_stride", "split_stride")]
    compiled = triton.compile(
        _source(kernel, names, types, constants, even), target=GPUTarget("cuda", capability, 32), options=options
    )
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    usage = subprocess.run([_CUOBJDUMP, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    found = _STACK.search(usage)
    assert found, usage
    ptx = compiled.asm["ptx"]
    units = next((name for name in ("wgmma", "mma") if f"{name}." in ptx), "")
    return Resources(int(found[1]), int(found[2]), compiled.metadata.shared, units)


def _source(
    kernel: triton.JITFunction,
    names: list[str],
    types: Mapping[str, str],
    constants: Mapping[str, int | float | bool],
    even: list[str],
) -> ASTSource:
    """The source with its facts, as this version of Triton takes them."""
    place = {name: index for index, name in enumerate(names)}
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 2):
        from triton.compiler.compiler import AttrsDescriptor

        attrs = AttrsDescriptor(divisible_by_16=tuple(place[name] for name in even), equal_to_1=())
        return ASTSource(kernel, {name: types[name] for name in types}, dict(constants), attrs)
    signature = {name: types.get(name, "constexpr") for name in names}
    attrs = {(place[name],): [["tt.divisibility", 16]] for name in even}
    return ASTSource(kernel, signature, {(place[name],): value for name, value in constants.items()}, attrs)
