"""Builds the native library from `src/`: the plain files once, every `*_kernels.cpp` once per instruction-set level.

`setup.py` loads this file by its path; `python -m inference_shardformer.kernels.cpu.build` builds in place.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).resolve().parent
SOURCES = FOLDER / "src"
LIBRARY = "_native.so"
RECORD = "_native.json"

_COMMON = ("-std=gnu++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti", "-fno-math-errno")
_WARNINGS = ("-Wall", "-Wextra", "-Wno-psabi", "-Wno-ignored-attributes")
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mprefer-vector-width=512")
_AVX512_BF16 = (*_AVX512, "-mavx512bf16")
_LEVELS: dict[str, dict[str, tuple[str, ...]]] = {
    "x86_64": {
        "avx2": _AVX2,
        "avx512": _AVX512,
        "avx512_bf16": _AVX512_BF16,
        "amx": (*_AVX512_BF16, "-mavx512fp16", "-mamx-tile", "-mamx-bf16", "-mamx-int8"),
    },
}


@dataclass(frozen=True)
class BuildRecord:
    """What came of building the library: the levels it has, or why there is none."""

    levels: tuple[str, ...]
    compiler: str
    digest: str  # of the sources
    error: str = ""

    def write(self, folder: Path) -> None:
        """Keep the record beside the library."""
        (folder / RECORD).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> BuildRecord | None:
        """The record of a folder; `None` when nothing was ever built there, or the file is damaged."""
        try:
            values = json.loads((folder / RECORD).read_text(encoding="utf-8"))
            return cls(**(values | {"levels": tuple(values["levels"])}))
        except (OSError, ValueError, TypeError, KeyError):
            return None


class _Unit(NamedTuple):
    source: Path
    target: Path  # the object file
    command: list[str]


class _CompileError(Exception):
    """There is no compiler, or it refused a file."""


def build(target: Path = FOLDER, *, work: Path | None = None) -> BuildRecord:
    """Build the library into folder `target` and leave a record beside it. A failure is in the record, not raised.

    A failure leaves an earlier library as it is: the record's digest tells that it is of other sources. `work`
    keeps the object files, so that only what changed is compiled again. Concurrent builds wait for each other.
    """
    target.mkdir(parents=True, exist_ok=True)
    work = work or SOURCES / "build"
    work.mkdir(parents=True, exist_ok=True)
    with _locked(work / "lock"):
        record = _build(target, work)
        record.write(target)
    return record


def source_digest() -> str:
    """A fingerprint of everything that is compiled, and of this file."""
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for path in sorted(path for path in SOURCES.iterdir() if path.is_file()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _build(target: Path, work: Path) -> BuildRecord:
    digest = source_digest()
    try:
        compiler = _compiler()
    except _CompileError as exc:
        return BuildRecord((), "", digest, f"no C++ compiler: {exc}")
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        flags = _LEVELS.get(platform.machine(), {})
        try:
            known = list(pool.map(lambda level: _accepts(compiler, flags[level]), flags))
            levels = {level: flags[level] for level, is_known in zip(flags, known, strict=True) if is_known}
            units = list(_units(compiler, levels, work))
            list(pool.map(_compile, units))
            _link(compiler, [unit.target for unit in units], target / LIBRARY)
        except _CompileError as exc:
            return BuildRecord((), shlex.join(compiler), digest, str(exc))
    return BuildRecord(("portable", *levels), shlex.join(compiler), digest)


def _compiler() -> list[str]:
    """The command of the C++ compiler: what `$CXX` names, and nothing else, or the first that is there."""
    named = os.environ.get("CXX", "")
    try:
        candidates = [command] if (command := shlex.split(named)) else [["g++"], ["c++"], ["clang++"]]
    except ValueError as exc:
        raise _CompileError(f"CXX={named!r} is no command: {exc}") from exc
    for command in candidates:
        if shutil.which(command[0]):
            return command
    raise _CompileError(f"CXX={named!r} is no program here" if named else "none of g++, c++ and clang++ is here")


def _accepts(compiler: list[str], flags: tuple[str, ...]) -> bool:
    """Whether the compiler knows a level's instructions."""
    command = [*compiler, *flags, "-x", "c++", "-fsyntax-only", "-include", "immintrin.h", os.devnull]
    return _ran(command).returncode == 0


def _units(compiler: list[str], levels: dict[str, tuple[str, ...]], work: Path) -> Iterator[_Unit]:
    """Every object file with its command; the long ones first, so that the last one to finish is a short one."""
    with_levels = [f"-DISF_WITH_{level.upper()}" for level in levels]
    base = [*compiler, *_COMMON, *_WARNINGS, *with_levels, "-MMD", "-c"]
    sources = sorted(SOURCES.glob("*.cpp"))
    by_level = [path for path in sources if path.stem.endswith("_kernels")]
    for level, flags in [*reversed(levels.items()), ("portable", ())]:
        for path in by_level:
            unit = work / f"{path.stem}.{level}.o"
            yield _Unit(path, unit, [*base, *flags, f"-DISF_LEVEL={level}", str(path), "-o", str(unit)])
    for path in sources:
        if path not in by_level:
            unit = work / f"{path.stem}.o"
            yield _Unit(path, unit, [*base, str(path), "-o", str(unit)])


def _compile(unit: _Unit) -> None:
    """Bring one object file up to date."""
    stamp = unit.target.with_suffix(".stamp")
    wanted = _state(unit)
    if unit.target.exists() and stamp.exists() and stamp.read_text(encoding="utf-8") == wanted:
        return
    stamp.unlink(missing_ok=True)
    _run(unit.command)
    stamp.write_text(_state(unit), encoding="utf-8")


def _state(unit: _Unit) -> str:
    """The command and the content of every file that went into an object, as far as an earlier compilation told."""
    rules = unit.target.with_suffix(".d")
    text = rules.read_text(encoding="utf-8").replace("\\\n", " ") if rules.exists() else ""
    own = [name for name in text.partition(":")[2].split() if Path(name).parent == SOURCES] or [str(unit.source)]
    digest = hashlib.sha256()
    for path in map(Path, own):
        digest.update(path.read_bytes() if path.exists() else b"")
    return f"{shlex.join(unit.command)}\n{digest.hexdigest()}\n"


def _link(compiler: list[str], objects: list[Path], library: Path) -> None:
    """Link without an OpenMP runtime: its symbols are found in the one that torch loads."""
    fresh = library.with_name(f"{library.name}.{os.getpid()}")
    try:
        _run([*compiler, "-shared", "-o", str(fresh), *map(str, objects)])
        fresh.replace(library)
    finally:
        fresh.unlink(missing_ok=True)


def _run(command: list[str]) -> None:
    done = _ran(command)
    if done.returncode != 0:
        status = done.returncode
        end = f"ended with status {status}" if status > 0 else f"was killed by signal {-status}"
        raise _CompileError(f"{shlex.join(command)} {end}: {done.stderr[-2000:].strip() or 'it says nothing'}")


def _ran(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run it to its end. Raises `_CompileError` for a file that the system cannot execute."""
    try:
        return subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    except OSError as exc:
        raise _CompileError(f"{shlex.join(command)} does not start: {exc}") from exc


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def main() -> int:
    """Build in place and say what came of it."""
    record = build()
    sys.stdout.write(record.error + "\n" if record.error else f"built {LIBRARY} for {', '.join(record.levels)}\n")
    return 1 if record.error else 0


if __name__ == "__main__":
    sys.exit(main())
