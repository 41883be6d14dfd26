"""Probes: whatever a foreign library does while it is imported becomes a verdict with a remedy, never a crash here."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from inference_shardformer.probing import probe as probing
from inference_shardformer.probing.collect import read_cpu
from inference_shardformer.probing.facts import CpuFacts, DeviceFacts, HostFacts
from inference_shardformer.probing.requirement import ProbeResult, Requirement

REMEDY = "pip install fakelib==2.8"


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder on the import path."""
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def install(site: Path, source: str, *, name: str = "fakelib", version: str = "") -> None:
    """A package of one file, with the metadata of a distribution if it has a version."""
    (site / name).mkdir()
    (site / name / "__init__.py").write_text(source)
    if version:
        info = site / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    importlib.invalidate_caches()


def probed(module: str = "fakelib", *, timeout_s: float = 20.0, before: tuple[str, ...] = (), **facts) -> ProbeResult:
    """Probe now and, unless a test asks for it, without importing torch first, which takes a second."""
    return probing.probe_now(Requirement(module, REMEDY, **facts), before=before, timeout_s=timeout_s)


def no_process(*_args, **_kwargs):
    raise AssertionError("a process was started")


class TestClassification:
    def test_works(self, site):
        install(site, "print('chatter on standard output')\nclass Api: call = len\n", version="2.8.3.post2")
        assert probed(min_version="2.8", names=("Api.call",)) == ProbeResult("fakelib", "ok", "2.8.3.post2")
        assert "fakelib" not in sys.modules

    def test_missing_needs_no_process(self, monkeypatch):
        monkeypatch.setattr(subprocess, "Popen", no_process)
        result = probed("fakelib.ops")
        assert (result.status, result.detail, result.remedy) == ("missing", "fakelib is not installed", REMEDY)

    def test_missing_part(self, site):
        install(site, "", version="3.0")
        result = probed("fakelib.cute.interface")
        assert (result.status, result.version, result.remedy) == ("missing", "3.0", REMEDY)
        assert "fakelib 3.0 has no module fakelib.cute" in result.detail

    def test_missing_dependency(self, site):
        install(site, "import no_such_einops")
        result = probed()
        assert result.status == "broken"
        assert "needs the module no_such_einops" in result.detail
        assert result.remedy == "install what brings no_such_einops"

    def test_too_old_needs_no_process(self, site, monkeypatch):
        install(site, "", version="2.7.4")
        monkeypatch.setattr(subprocess, "Popen", no_process)
        result = probed(min_version="2.8")
        assert (result.status, result.version, result.remedy) == ("too_old", "2.7.4", REMEDY)
        assert result.detail == "fakelib 2.7.4 is older than 2.8"

    @pytest.mark.parametrize(
        ("found", "wanted", "status"),
        [("4.0.0b36", "4.0", "too_old"), ("2.10", "2.9", "ok"), ("2.8.3.post2", "2.8.3", "ok"), ("odd", "2", "ok")],
    )
    def test_version_the_module_names_itself(self, site, found, wanted, status):
        install(site, f"__version__ = {found!r}")
        result = probed(min_version=wanted)
        assert (result.status, result.version) == (status, found)

    def test_name_that_is_not_offered(self, site):
        install(site, "", version="1.0")
        result = probed(names=("varlen",))
        assert (result.status, result.detail) == ("broken", "fakelib offers no varlen")

    @pytest.mark.parametrize(
        ("source", "status", "said"),
        [
            ("raise ImportError('fakelib.so: undefined symbol: _ZN3c10')", "abi_mismatch", "undefined symbol: _ZN3c10"),
            ("raise OSError('libcudart.so.11: cannot open shared object file')", "abi_mismatch", "libcudart.so.11"),
            ('raise ImportError("/lib/libc.so.6: version `GLIBC_2.38\' not found")', "abi_mismatch", "GLIBC_2.38"),
            (
                "try:\n  raise ImportError('undefined symbol: x')\nexcept ImportError as e:\n"
                "  raise RuntimeError('cannot start') from e",
                "abi_mismatch",
                "RuntimeError: cannot start",
            ),
            ("raise OSError('libcuda.so.1: cannot open shared object file')", "wrong_device", "libcuda.so.1"),
            ("raise RuntimeError('Found no NVIDIA driver on your system')", "wrong_device", "no NVIDIA driver"),
            ("raise RuntimeError('0 active drivers ([])')", "wrong_device", "0 active drivers"),
            ("raise ZeroDivisionError", "broken", "its import raised ZeroDivisionError"),
            ("raise SystemExit(0)", "broken", "its import raised SystemExit: 0"),
            ("import os; os._exit(7)", "broken", "ended the process with exit code 7"),
            ("import os; os._exit(0)", "broken", "ended the process with exit code 0"),
        ],
    )
    def test_what_an_import_raises(self, site, source, status, said):
        install(site, source, version="1.0")
        result = probed()
        assert (result.status, result.version) == (status, "1.0")
        assert said in result.detail
        assert result.remedy
        assert status == "wrong_device" or REMEDY in result.remedy

    def test_a_long_text_is_cut(self, site):
        install(site, "raise ValueError('x' * 10_000)")
        assert len(probed().detail) == 400

    def test_segmentation_fault(self, site):
        install(site, "import os, signal\n\nos.kill(os.getpid(), signal.SIGSEGV)\n")
        result = probed()
        assert result.status == "broken"
        assert f"crashed with SIGSEGV, at {site}/fakelib/__init__.py:3" in result.detail
        assert REMEDY in result.remedy

    def test_hang(self, site):
        install(site, "import time\ntime.sleep(600)\n")
        result = probed(timeout_s=2.0)  # in which the child must come to the line where it hangs
        assert result.status == "broken"
        assert f"did not end within 2 s, at {site}/fakelib/__init__.py:2" in result.detail

    def test_hang_that_defeats_the_watchdog(self, site, monkeypatch):
        source = "import faulthandler, time\nfaulthandler.cancel_dump_traceback_later()\ntime.sleep(600)\n"
        install(site, source)
        monkeypatch.setattr(probing, "_BEFORE_TIMEOUT_S", 0.5)
        assert "did not end within 0.5 s" in probed(timeout_s=0.5).detail

    def test_a_background_process_of_the_library_is_not_waited_for(self, site):
        source = (
            "import subprocess, sys\nchild = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])"
        )
        install(site, f"{source}\nopen({str(site / 'pid')!r}, 'w').write(str(child.pid))\n")
        assert probed(timeout_s=60).status == "ok"
        os.kill(int((site / "pid").read_text()), 9)

    @pytest.mark.skipif(not shutil.which("cc"), reason="needs a C compiler")
    def test_a_binary_with_an_undefined_symbol(self, site):
        source = "int not_in_any_libtorch(void);\nint PyInit_fakelib(void) { return not_in_any_libtorch(); }\n"
        (site / "fakelib.c").write_text(source)
        library = site / f"fakelib{sysconfig.get_config_var('EXT_SUFFIX')}"
        subprocess.run(["cc", "-shared", "-fPIC", "-o", library, site / "fakelib.c"], check=True)
        importlib.invalidate_caches()
        result = probed()
        assert result.status == "abi_mismatch"
        assert "undefined symbol: not_in_any_libtorch" in result.detail
        assert "made for this torch" in result.remedy

    def test_torch_is_there_first(self, site):
        install(site, "import sys\nif 'torch' not in sys.modules: raise ImportError('libc10.so: undefined symbol')\n")
        assert probed(before=("torch",)).status == "ok"


class TestOnce:
    def test_a_result_is_kept_for_the_process(self, site, monkeypatch):
        requirement = Requirement("kept_fakelib", REMEDY, min_version="2")
        install(site, "", name="kept_fakelib", version="1.0")
        assert probing.probe_all([requirement, requirement])[requirement].status == "too_old"
        shutil.rmtree(site / "kept_fakelib")
        assert probing.probe_all([requirement])[requirement].status == "too_old"

    def test_nothing_to_probe_costs_nothing(self, monkeypatch):
        monkeypatch.setattr(probing, "ThreadPoolExecutor", no_process)
        monkeypatch.setattr(subprocess, "Popen", no_process)
        assert probing.probe_all([]) == {}


class TestValues:
    HOST = HostFacts(
        cpu=CpuFacts("x86_64", "Xeon", ("amx_bf16", "avx2")),
        accelerators=(
            DeviceFacts("cuda", "H200", (9, 0), 10),
            DeviceFacts("cuda", "T4", (7, 5)),
            DeviceFacts("xpu", "Arc"),
        ),
        torch="2.13",
        process_group_backends=("gloo",),
    )

    def test_round_trip(self):
        assert HostFacts.from_json(self.HOST.to_json()) == self.HOST
        result = ProbeResult("a.b", "abi_mismatch", "1", "why", "what to do")
        assert ProbeResult.from_json(result.to_json()) == result

    @pytest.mark.parametrize(
        "text", ['{"cpu": {"architecture": "x", "name": "y", "flags": []}}', "{}", "[]", "nonsense"]
    )
    def test_other_json_is_refused(self, text):
        with pytest.raises(ValueError):
            HostFacts.from_json(text)

    def test_an_unknown_status_is_refused(self):
        with pytest.raises(ValueError, match="status"):
            ProbeResult.from_json('{"name": "a", "status": "fine"}')

    @pytest.mark.parametrize(
        ("device_type", "index", "name"),
        [
            ("cpu", None, "Xeon"),
            ("cuda", None, "H200"),
            ("cuda", 1, "T4"),
            ("cuda", 2, None),
            ("xpu", 0, "Arc"),
            ("mps", 0, None),
        ],
    )
    def test_devices_as_torch_counts_them(self, device_type, index, name):
        device = self.HOST.device(device_type, index)
        assert (device.name if device else None) == name

    def test_rocm_is_cuda_to_torch(self):
        host = HostFacts(CpuFacts("x86_64", "EPYC"), (DeviceFacts("rocm", "MI300X"),))
        assert host.device("cuda", 0) == host.accelerators[0]
        assert host.device("rocm", 0) is None


class TestHardware:
    @pytest.mark.parametrize(
        ("facts", "device", "problem"),
        [
            ({"platforms": ("cuda",)}, DeviceFacts("rocm", "MI300X"), "works on cuda, this is rocm"),
            ({"platforms": ("cuda", "rocm")}, DeviceFacts("rocm", "MI300X"), None),
            ({}, DeviceFacts("xpu", "Arc"), None),
            ({"min_capability": (8, 0)}, DeviceFacts("cuda", "T4", (7, 5)), "needs compute capability 8.0, T4 has 7.5"),
            ({"min_capability": (8, 0)}, DeviceFacts("cuda", "B200", (10, 0)), None),
            ({"isa": ("avx2", "sve")}, DeviceFacts("cpu", "Xeon"), "instruction sets sve, which Xeon lacks"),
            ({"isa": ("avx2", "amx_bf16")}, DeviceFacts("cpu", "Xeon"), None),
        ],
    )
    def test_problem(self, facts, device, problem):
        found = Requirement("fakelib", REMEDY, **facts).hardware_problem(TestValues.HOST, device)
        assert found is None if problem is None else problem in found


class TestCpuinfo:
    @pytest.mark.parametrize(
        ("text", "name", "isa"),
        [
            (
                "processor : 0\nmodel name : Xeon\nflags : sse avx2 amx_bf16 ht\n\nprocessor : 1\nflags : sve\n",
                "Xeon",
                ("amx_bf16", "avx2"),
            ),
            ("processor : 0\nFeatures : fp asimd bf16 sve2\nCPU part : 0xd4f\n", None, ("asimd", "bf16", "sve2")),
            ("", None, ()),
        ],
    )
    def test_first_block_counts(self, tmp_path, text, name, isa):
        (tmp_path / "cpuinfo").write_text(text)
        cpu = read_cpu(tmp_path / "cpuinfo")
        assert cpu.isa == isa
        assert name is None or cpu.name == name

    def test_no_such_file(self, tmp_path):
        assert read_cpu(tmp_path / "none").isa == ()
