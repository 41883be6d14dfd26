"""Loads the native library once, on demand, and says why when it cannot be had."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from inference_shardformer.kernels.cpu.build import FOLDER, LIBRARY, BuildRecord, source_digest

_OPENMP = re.compile(r"/lib(?:gomp|iomp5|omp)[^/]*\.(?:so|dylib)[.\d]*$")
_MAPS = Path("/proc/self/maps")
_REBUILD = "run python -m inference_shardformer.kernels.cpu.build"

Entry = Callable[[ctypes.Structure, int], int]


class NativeProblem(NamedTuple):
    """Why there are no native kernels: a stable code, a sentence, and what to do."""

    code: str
    message: str
    remedy: str


class NativeUnavailableError(RuntimeError):
    """The native library cannot be used; `problem` says why."""

    def __init__(self, problem: NativeProblem) -> None:
        super().__init__(f"{problem.message}\n  remedy: {problem.remedy}")
        self.problem = problem


@dataclass(frozen=True)
class NativeStatus:
    """The state of the native library: either `problem` is set, or the levels are."""

    path: str
    isa_level: str = ""  # the one in use
    isa_levels: tuple[str, ...] = ()  # what this machine and this build have, lowest first
    is_stale: bool = False  # the sources were changed after it was built
    problem: NativeProblem | None = None


class NativeLibrary:
    """The loaded library. Its entries release the interpreter's lock and run on torch's OpenMP threads."""

    def __init__(self, handle: ctypes.CDLL, path: Path) -> None:
        self.path = path
        self._handle = handle
        self._level = self.function("isf_isa_level", restype=ctypes.c_char_p)
        self._usable_level = self.function("isf_usable_isa_level", argtypes=(ctypes.c_int32,), restype=ctypes.c_char_p)
        self._set_level = self.function("isf_set_isa_level", argtypes=(ctypes.c_char_p,), restype=ctypes.c_int32)

    @property
    def isa_level(self) -> str:
        """The instruction-set level in use."""
        return str(self._level(), "ascii")

    @property
    def isa_levels(self) -> tuple[str, ...]:
        """The levels that this machine and this build have, lowest first."""
        names: list[str] = []
        while (name := self._usable_level(len(names))) is not None:
            names.append(str(name, "ascii"))
        return tuple(names)

    def set_isa_level(self, name: str) -> None:
        """Use another level from now on, in the whole process. `ValueError` unless it is one of `isa_levels`."""
        if self._set_level(name.encode()) != 0:
            raise ValueError(f"isa_level={name!r} is not available here; choose one of {', '.join(self.isa_levels)}")

    def entry(self, name: str, arguments: type[ctypes.Structure]) -> Entry:
        """The kernel `isf_<name>(arguments, num_threads)`; the struct's size is checked against the library's own.

        Raises `NativeUnavailableError` when they differ: the library is of another version than this file.
        """
        size = self.function(f"isf_sizeof_{name}", restype=ctypes.c_int64)()
        if size != ctypes.sizeof(arguments):
            message = f"{self.path} takes {size} bytes of arguments for {name}, not {ctypes.sizeof(arguments)}"
            raise NativeUnavailableError(NativeProblem("native_layout", message, f"rebuild it: {_REBUILD}"))
        return self.function(f"isf_{name}", argtypes=(ctypes.POINTER(arguments), ctypes.c_int32))

    def function(
        self, name: str, *, argtypes: tuple[type, ...] = (), restype: type | None = ctypes.c_int32
    ) -> Callable[..., Any]:
        """Any exported function, typed. Raises `NativeUnavailableError` when the library lacks it."""
        try:
            found = getattr(self._handle, name)
        except AttributeError as exc:
            problem = NativeProblem("native_layout", f"{self.path} has no {name}", f"rebuild it: {_REBUILD}")
            raise NativeUnavailableError(problem) from exc
        found.argtypes, found.restype = argtypes, restype
        return found


class NativeKernel:
    """One kernel of the library, bound at its first call: `kernel(*values)` runs it on torch's number of threads."""

    def __init__(self, name: str, arguments: type[ctypes.Structure]) -> None:
        self.name, self.arguments = name, arguments
        self._entry: Entry | None = None

    def __call__(self, *values: object) -> None:
        """Run over the arguments' fields in order. Raises `NativeUnavailableError` without a library."""
        entry = self._entry or self.bind()
        if entry(self.arguments(*values), torch.get_num_threads()) != 0:
            raise MemoryError(f"the kernel {self.name} found no memory for its workspace")

    def bind(self) -> Entry:
        """Find the entry and check the layout of its arguments."""
        self._entry = native().entry(self.name, self.arguments)
        return self._entry


def native() -> NativeLibrary:
    """The library, loaded at the first call. Raises `NativeUnavailableError`, always the same one."""
    found = _load(FOLDER)
    if isinstance(found, NativeProblem):
        raise NativeUnavailableError(found)
    return found


def native_problem() -> NativeProblem | None:
    """Why the library cannot be used; `None` when it can."""
    found = _load(FOLDER)
    return found if isinstance(found, NativeProblem) else None


def native_status() -> NativeStatus:
    """Everything there is to say about the library."""
    found, path = _load(FOLDER), str(FOLDER / LIBRARY)
    if isinstance(found, NativeProblem):
        return NativeStatus(path, problem=found)
    record = BuildRecord.read(FOLDER)
    is_stale = record is None or bool(record.error) or record.digest != source_digest()
    return NativeStatus(path, found.isa_level, found.isa_levels, is_stale)


@cache
def _load(folder: Path) -> NativeLibrary | NativeProblem:
    path = folder / LIBRARY
    if not path.exists():
        return _absence(folder)
    if not _share_openmp():
        message = f"torch {torch.__version__} has loaded no OpenMP runtime whose threads the kernels could use"
        return NativeProblem("native_openmp", message, "install a build of torch with OpenMP, as the official ones are")
    try:
        return NativeLibrary(ctypes.CDLL(str(path)), path)
    except OSError as exc:
        return NativeProblem("native_load", f"{path} does not load: {exc}", f"rebuild it here: {_REBUILD}")
    except NativeUnavailableError as exc:
        return exc.problem


def _absence(folder: Path) -> NativeProblem:
    """Why there is no file."""
    record = BuildRecord.read(folder)
    if record is not None and record.error:
        message = f"the native CPU kernels could not be built: {record.error}"
        return NativeProblem("native_build", message, f"install g++ 10 or clang++ 14 or later, then {_REBUILD}")
    message = f"the native CPU kernels were never built: {folder} holds no {LIBRARY}"
    return NativeProblem("native_missing", message, f"with a C++ compiler, {_REBUILD}")


def _share_openmp() -> bool:
    """Make the symbols of torch's OpenMP runtime visible to the library; says whether there are any."""
    if _has_openmp():
        return True
    for path in _loaded_openmp():
        ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
    return _has_openmp()


def _has_openmp() -> bool:
    return hasattr(ctypes.CDLL(None), "GOMP_parallel")


def _loaded_openmp() -> list[str]:
    """Paths of the OpenMP runtimes in this process."""
    if not _MAPS.exists():
        return []
    paths = {line.split(maxsplit=5)[5] for line in _MAPS.read_text().splitlines() if "/" in line}
    return sorted(path for path in paths if _OPENMP.search(path))
