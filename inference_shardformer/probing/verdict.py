"""What the end of a probe's process means: which status, in which words, with which remedy."""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence

from inference_shardformer.probing.requirement import ProbeResult, Requirement, Status

_MAX_DETAIL = 400
# Driver libraries come with the device's driver: without it there is no device.
_NO_DEVICE = re.compile(
    r"libcuda\.so|libamdhip64\.so.*No such|no CUDA-capable device|CUDA driver|NVIDIA driver|no CUDA GPUs|"
    r"not compiled with CUDA|no kernel image|compute capability|no HIP|requires a GPU|"
    r"0 active drivers|only supports? .{0,40}GPU",
    re.IGNORECASE,
)
_ABI = re.compile(
    r"undefined symbol|symbol not found|version `[^']+' not found|cannot open shared object file|"
    r"invalid ELF header|wrong ELF class|compiled with a different|compiled using NumPy|module compiled against",
    re.IGNORECASE,
)
_PLACE = re.compile(r'^  File "(?P<file>[^"<]+)", line (?P<line>\d+)', re.MULTILINE)


def raised(
    requirement: Requirement, version: str, error: str, messages: Sequence[str], absent_module: str | None
) -> ProbeResult:
    """The import ended with an exception. `messages` are its text and those of its causes."""
    everything = "\n".join(messages)
    said = f"{error}: {messages[0]}" if messages and messages[0] else error
    if error == "ModuleNotFoundError" and absent_module:
        if requirement.module == absent_module or requirement.module.startswith(f"{absent_module}."):
            detail = f"{requirement.package} {version or 'as installed'} has no module {absent_module}"
            return _result(requirement, "missing", version, detail, requirement.remedy)
        detail = f"{requirement.module} needs the module {absent_module}, which is not installed"
        return _result(requirement, "broken", version, detail, f"install what brings {absent_module}")
    if _NO_DEVICE.search(everything):
        remedy = "run it on a machine with such a device and its driver, or choose another backend"
        return _result(requirement, "wrong_device", version, f"its import raised {said}", remedy)
    if _ABI.search(everything):
        remedy = f"install a build of {requirement.package} made for this torch and this CUDA: {requirement.remedy}"
        return _result(requirement, "abi_mismatch", version, f"its import raised {said}", remedy)
    return broken(requirement, version, f"its import raised {said}")


def died(requirement: Requirement, version: str, returncode: int | None, stderr: str, timeout_s: float) -> ProbeResult:
    """The process ended without an answer: a signal, an exit of its own, or the watchdog."""
    if "Timeout (" in stderr or returncode is None:
        return broken(requirement, version, f"its import did not end within {timeout_s:g} s{_place(stderr)}")
    if returncode < 0:
        return broken(requirement, version, f"its import crashed with {_signal_name(-returncode)}{_place(stderr)}")
    return broken(requirement, version, f"its import ended the process with exit code {returncode}{_place(stderr)}")


def broken(requirement: Requirement, version: str, detail: str) -> ProbeResult:
    """The library is there and does not work."""
    remedy = f"reinstall or uninstall {requirement.distribution or requirement.package}: {requirement.remedy}"
    return _result(requirement, "broken", version, detail, remedy)


def _result(requirement: Requirement, status: Status, version: str, detail: str, remedy: str) -> ProbeResult:
    short = detail if len(detail) <= _MAX_DETAIL else detail[: _MAX_DETAIL - 3] + "..."
    return ProbeResult(requirement.module, status, version, short, remedy)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _place(stderr: str) -> str:
    """Where the innermost Python frame stood, from faulthandler's traceback."""
    frame = _PLACE.search(stderr)
    return f", at {frame['file']}:{frame['line']}" if frame else ""
