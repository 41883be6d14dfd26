"""The native library: built, rebuilt and refused; loaded once, on demand, on torch's own OpenMP threads."""

from __future__ import annotations

import ctypes
import json
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from inference_shardformer.doctor.machine import openmp_runtimes
from inference_shardformer.kernels.cpu import arguments, build, elementwise, library
from inference_shardformer.kernels.cpu.library import (
    NativeKernel,
    NativeUnavailableError,
    native,
    native_problem,
    native_status,
)

STRUCTS = {
    "rms_norm": arguments.RmsNormArgs,
    "layer_norm": arguments.LayerNormArgs,
    "gated": arguments.GatedArgs,
    "add": arguments.AddArgs,
    "rotary": arguments.RotaryArgs,
    "argmax": arguments.ArgmaxArgs,
    "topk": arguments.TopKArgs,
}
# A library in miniature: everything the loader asks for, and one kernel.
MINIATURE = {
    "level.h": '#define ISF_EXPORT __attribute__((visibility("default")))\n',
    "plain.cpp": """#include "level.h"
extern "C" {
ISF_EXPORT const char* isf_isa_level() { return "portable"; }
ISF_EXPORT const char* isf_usable_isa_level(int i) { return i == 0 ? "portable" : nullptr; }
ISF_EXPORT int isf_set_isa_level(const char*) { return -1; }
ISF_EXPORT long isf_sizeof_probe() { return 24; }
}
""",
    "some_kernels.cpp": "namespace ISF_LEVEL { int answer() { return 42; } }\n",
}


class Probe(ctypes.Structure):
    """One field more than the miniature's."""

    _fields_ = [(name, ctypes.c_int64) for name in "abcd"]


@pytest.fixture
def sources(tmp_path, monkeypatch, native_library) -> Path:
    """A folder of sources that builds in no time, in place of ours."""
    folder = tmp_path / "src"
    folder.mkdir()
    for name, text in MINIATURE.items():
        (folder / name).write_text(text)
    monkeypatch.setattr(build, "SOURCES", folder)
    monkeypatch.setattr(library, "FOLDER", tmp_path / "built")
    return folder


@pytest.fixture
def built(sources, tmp_path) -> Path:
    record = build.build(tmp_path / "built")
    assert record.error == ""
    return tmp_path / "built"


class TestBuild:
    def test_every_level_is_compiled_and_recorded(self, sources, built):
        record = build.BuildRecord.read(built)
        assert record.levels[0] == "portable"
        assert {path.name for path in (sources / "build").glob("some*.o")} == {
            f"some_kernels.{level}.o" for level in record.levels
        }

    def test_only_what_changed_is_compiled_again(self, sources, built):
        times = {path.name: path.stat().st_mtime_ns for path in (sources / "build").glob("*.o")}
        (sources / "some_kernels.cpp").write_text("namespace ISF_LEVEL { int answer() { return 43; } }\n")
        build.build(built)
        changed = {path.name for path in (sources / "build").glob("*.o") if path.stat().st_mtime_ns != times[path.name]}
        assert changed == {name for name in times if name.startswith("some")}
        (sources / "level.h").write_text(MINIATURE["level.h"] + "// changed\n")
        build.build(built)
        assert (sources / "build/plain.o").stat().st_mtime_ns != times["plain.o"]

    def test_a_header_that_is_gone_or_new_is_noticed(self, sources, built):
        (sources / "plain.cpp").write_text('#include "other.h"\n' + MINIATURE["plain.cpp"])
        assert "other.h" in build.build(built).error
        (sources / "other.h").write_text("\n")
        assert build.build(built).error == ""

    def test_an_error_is_recorded_and_leaves_the_old_library(self, sources, built):
        before = (built / build.LIBRARY).read_bytes()
        (sources / "plain.cpp").write_text("this is no program")
        record = build.build(built)
        assert "plain.cpp" in record.error
        assert build.BuildRecord.read(built) == record
        assert (built / build.LIBRARY).read_bytes() == before
        assert native_status().is_stale

    @pytest.mark.parametrize(
        ("cxx", "said"),
        [
            ("no-such-compiler", "no C++ compiler: CXX='no-such-compiler' is no program here"),
            ("'g++", 'no C++ compiler: CXX="\'g++" is no command'),
            ("false", "ended with status 1: it says nothing"),
        ],
    )
    def test_without_a_compiler(self, sources, tmp_path, monkeypatch, cxx, said):
        monkeypatch.setenv("CXX", cxx)
        record = build.build(tmp_path / "built")
        assert said in record.error
        assert record.levels == ()
        problem = native_problem()
        assert problem.code == "native_build"
        assert said in problem.message
        assert "g++" in problem.remedy
        with pytest.raises(NativeUnavailableError, match="could not be built") as caught:
            native()
        assert caught.value.problem == problem
        assert "remedy: install g++" in str(caught.value)

    def test_no_compiler_at_all(self, sources, tmp_path, monkeypatch):
        monkeypatch.delenv("CXX", raising=False)
        monkeypatch.setenv("PATH", str(tmp_path))
        assert build.build(tmp_path / "built").error == "no C++ compiler: none of g++, c++ and clang++ is here"

    @pytest.mark.parametrize(
        ("program", "said"),
        [("#!/bin/sh\nkill -SEGV $$\n", "was killed by signal 11"), ("\x7fELF, but no program", "does not start")],
        ids=["crashes", "does not start"],
    )
    def test_a_broken_compiler_is_a_verdict(self, sources, tmp_path, monkeypatch, program, said):
        broken = tmp_path / "broken-g++"
        broken.write_text(program)
        broken.chmod(0o755)
        monkeypatch.setenv("CXX", str(broken))
        record = build.build(tmp_path / "built")
        assert said in record.error
        assert str(broken) in record.error
        assert native_problem().code == "native_build"

    def test_two_builds_are_the_same_bytes(self, sources, built, tmp_path):
        again = build.build(tmp_path / "again", work=tmp_path / "work")
        assert again == build.BuildRecord.read(built)
        assert (tmp_path / "again" / build.LIBRARY).read_bytes() == (built / build.LIBRARY).read_bytes()

    def test_a_level_that_the_compiler_does_not_know_is_left_out(self, sources, tmp_path, monkeypatch):
        monkeypatch.setattr(build, "_LEVELS", {build.platform.machine(): {"odd": ("-mno-such-instructions",)}})
        assert build.build(tmp_path / "built").levels == ("portable",)

    def test_another_architecture_has_the_portable_level(self, sources, tmp_path, monkeypatch):
        monkeypatch.setattr(build.platform, "machine", lambda: "aarch64")
        assert build.build(tmp_path / "built").levels == ("portable",)

    def test_a_damaged_record_is_none(self, tmp_path):
        assert build.BuildRecord.read(tmp_path) is None
        for text in ("no json", "{}", '{"levels": 3}'):
            (tmp_path / build.RECORD).write_text(text)
            assert build.BuildRecord.read(tmp_path) is None

    def test_the_command(self, sources, monkeypatch, tmp_path, capsys):
        monkeypatch.setattr(build, "FOLDER", tmp_path)
        monkeypatch.setattr(build.build, "__defaults__", (tmp_path / "built",))
        assert build.main() == 0
        assert capsys.readouterr().out.startswith("built _native.so for portable")
        (sources / "plain.cpp").write_text("this is no program")
        assert build.main() == 1
        assert "plain.cpp" in capsys.readouterr().out


class TestOurSources:
    def test_no_function_compiled_for_a_level_can_be_taken_for_another(self, native_library):
        """The linker keeps one copy of a weak symbol; were that one of a high level, the portable code would die."""
        if shutil.which("nm") is None:
            pytest.skip("no nm")
        objects = sorted((build.SOURCES / "build").glob("*_kernels.*.o"))
        done = subprocess.run(
            ["nm", "-C", "-A", "--defined-only", *objects], capture_output=True, text=True, check=True
        )
        weak = [line for line in done.stdout.splitlines() if line.split(maxsplit=3)[1] in "VWuvw"]
        assert objects
        assert not weak, weak[:5]

    def test_no_openmp_runtime_is_linked(self, native_library):
        needed = subprocess.run(
            ["readelf", "-d", str(native_library.path)], capture_output=True, text=True, check=True
        ).stdout
        assert "NEEDED" in needed
        assert "omp" not in needed

    @pytest.mark.parametrize("name", STRUCTS)
    def test_the_layouts_agree(self, name, native_library):
        native_library.entry(name, STRUCTS[name])


class TestLoading:
    def test_this_machine(self, native_library):
        status = native_status()
        assert status.problem is None
        assert status.isa_level == native_library.isa_level == status.isa_levels[-1]
        assert status.isa_levels[0] == "portable"
        assert set(status.isa_levels) <= set(build.BuildRecord.read(build.FOLDER).levels)
        assert not status.is_stale
        assert native() is native_library

    def test_levels_are_what_linux_says_of_the_processor(self, native_library):
        flags = set(Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split())
        assert ("avx2" in native_library.isa_levels) == ({"avx2", "fma", "f16c"} <= flags)
        assert ("avx512" in native_library.isa_levels) == ({"avx512f", "avx512bw", "avx512_vnni"} <= flags)
        assert ("amx" in native_library.isa_levels) == ({"avx512_bf16", "amx_tile", "amx_bf16", "amx_int8"} <= flags)

    @pytest.mark.parametrize("name", ["sse9", ""])
    def test_an_unknown_level_is_refused(self, native_library, name):
        with pytest.raises(ValueError, match=f"isa_level='{name}' is not available here; choose one of portable"):
            native_library.set_isa_level(name)

    def test_never_built(self, sources):
        problem = native_problem()
        assert problem.code == "native_missing"
        assert native_status().problem == problem

    def test_a_file_that_is_no_library(self, sources, tmp_path):
        (tmp_path / "built").mkdir()
        (tmp_path / "built" / build.LIBRARY).write_text("no library")
        assert native_problem().code == "native_load"

    def test_a_library_that_lacks_what_is_asked_for(self, built):
        with pytest.raises(NativeUnavailableError, match="has no isf_sizeof_gone") as caught:
            native().entry("gone", Probe)
        assert caught.value.problem.code == "native_layout"

    def test_a_library_without_the_loaders_own_functions(self, sources, tmp_path):
        (sources / "plain.cpp").write_text('extern "C" __attribute__((visibility("default"))) void f() {}\n')
        build.build(tmp_path / "built")
        assert native_problem().code == "native_layout"

    def test_arguments_of_another_size(self, built):
        with pytest.raises(NativeUnavailableError, match="takes 24 bytes of arguments for probe, not 32"):
            NativeKernel("probe", Probe)(1)

    def test_a_torch_without_openmp(self, built, monkeypatch):
        monkeypatch.setattr(library, "_has_openmp", lambda: False)
        monkeypatch.setattr(library, "_MAPS", Path("/nonexistent"))
        assert native_problem().code == "native_openmp"

    def test_openmp_that_is_loaded_but_hidden_is_made_visible(self, monkeypatch):
        opened = []
        monkeypatch.setattr(library, "_has_openmp", lambda: bool(opened))
        monkeypatch.setattr(library.ctypes, "CDLL", lambda path, mode: opened.append((path, mode)))
        assert library._share_openmp()
        assert opened == [(path, ctypes.RTLD_GLOBAL) for path in openmp_runtimes()]


SCRIPT = """
import json, sys, threading
import torch
from inference_shardformer.kernels.cpu import elementwise
from inference_shardformer.kernels.cpu.library import native
from inference_shardformer.doctor.machine import openmp_runtimes

def num_threads():
    with open("/proc/self/status") as status:
        return int(next(line for line in status if line.startswith("Threads:")).split()[1])

before = openmp_runtimes()
torch.set_num_threads(3)
large = torch.randn(4096, 512)
native()
start = num_threads()
elementwise.add(torch.ones(8), torch.ones(8))
small = num_threads() - start
elementwise.add(large, large)
ours = num_threads() - start
torch.add(large, large)
both = num_threads() - start
print(json.dumps({"before": before, "after": openmp_runtimes(), "small": small, "ours": ours, "both": both}))
"""


def test_one_openmp_runtime_and_its_threads_are_shared_with_torch(native_library):
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, cwd="/")
    said = json.loads(done.stdout)
    assert said["before"] == said["after"]
    assert len(said["after"]) == 1
    assert said["small"] == 0  # a small tensor wakes nobody
    assert said["ours"] == 2  # beside the calling thread
    assert said["both"] == 2  # torch uses the same ones


def test_importing_the_package_loads_no_library(native_library):
    script = (
        "import inference_shardformer, inference_shardformer.kernels.cpu.elementwise\n"
        "from inference_shardformer import InferenceEngine, InferenceShardformer\n"
        "assert '_native.so' not in open('/proc/self/maps').read()\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd="/")


def test_threads_of_python_run_beside_a_kernel(native_library):
    """The interpreter's lock is released: a thread counts on while another one is inside a long call."""
    x = torch.randn(10_000_000)
    counted: list[float] = []
    stop = threading.Event()

    def count() -> None:
        while not stop.wait(0.0005):
            counted.append(time.perf_counter())

    thread = threading.Thread(target=count)
    thread.start()
    calls = []
    while len(calls) < 1000 and not any(began < moment < ended for began, ended in calls for moment in counted):
        began = time.perf_counter()
        elementwise.add(x, x, out=x)
        calls.append((began, time.perf_counter()))
    stop.set()
    thread.join()
    assert len(calls) < 1000
