"""The native library for tests: built when its sources have changed, and used at every level of this machine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from inference_shardformer.kernels.cpu import build
from inference_shardformer.kernels.cpu.library import NativeLibrary, native

LEVELS = ("portable", "avx2", "avx512", "avx512_bf16", "amx")


@pytest.fixture(scope="session")
def native_library() -> NativeLibrary:
    """The library, up to date. Skips where there is no compiler."""
    record = build.build()
    if not record.compiler:
        pytest.skip(record.error)
    if record.error:
        pytest.fail(record.error)
    return native()


@pytest.fixture(params=LEVELS)
def isa_level(request: pytest.FixtureRequest, native_library: NativeLibrary) -> Iterator[str]:
    """One instruction-set level after the other; the best one is in use again afterwards."""
    if request.param not in native_library.isa_levels:
        pytest.skip(f"{request.param} is not a level of this machine and compiler")
    native_library.set_isa_level(request.param)
    yield request.param
    native_library.set_isa_level(native_library.isa_levels[-1])
