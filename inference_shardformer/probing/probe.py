"""Probes foreign libraries: cheap look-ups first, then an import in a process of its own that may crash or hang."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryFile

from packaging.version import InvalidVersion, Version

from inference_shardformer.probing.requirement import ProbeResult, Requirement
from inference_shardformer.probing.verdict import broken, died, raised

TIMEOUT_S = 20.0
# A library is imported behind torch, as it is here: its binaries expect to find torch's already loaded.
_BEFORE = ("torch",)
_BEFORE_TIMEOUT_S = 60.0
_CHILD = Path(__file__).with_name("child.py")
_AT_ONCE = 4


def probe_all(requirements: Iterable[Requirement]) -> Mapping[Requirement, ProbeResult]:
    """The result of every requirement. Each is probed once in this process; several at a time."""
    wanted = tuple(dict.fromkeys(requirements))
    if not wanted:
        return {}
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return dict(zip(wanted, pool.map(probe, wanted), strict=True))


@cache
def probe(requirement: Requirement) -> ProbeResult:
    """The result of one requirement. A process is started only where the library is present and new enough."""
    return probe_now(requirement)


def probe_now(
    requirement: Requirement, *, before: tuple[str, ...] = _BEFORE, timeout_s: float = TIMEOUT_S
) -> ProbeResult:
    """Probe without looking at earlier results. `before` is imported first and not counted in `timeout_s`."""
    if not _is_present(requirement.package):
        return ProbeResult(
            requirement.module, "missing", "", f"{requirement.package} is not installed", requirement.remedy
        )
    installed = _installed_version(requirement)
    if _is_older(installed, requirement.min_version):
        return _too_old(requirement, installed)
    result = _import_apart(requirement, installed, before, timeout_s)
    if result.status == "ok" and _is_older(result.version, requirement.min_version):
        return _too_old(requirement, result.version)
    return result


def _import_apart(requirement: Requirement, installed: str, before: tuple[str, ...], timeout_s: float) -> ProbeResult:
    order = {
        "path": [str(folder) for folder in sys.path],
        "before": before,
        "module": requirement.module,
        "names": requirement.names,
        "timeout_s": timeout_s,
    }
    code, out, err = _run(json.dumps(order).encode(), timeout_s + _BEFORE_TIMEOUT_S)
    if not out:
        return died(requirement, installed, code, err, timeout_s)
    answer = json.loads(out)
    if "error" in answer:
        return raised(requirement, installed, answer["error"], answer["messages"], answer["absent_module"])
    if answer["absent"]:
        return broken(requirement, installed, f"{requirement.module} offers no {', '.join(answer['absent'])}")
    return ProbeResult(requirement.module, "ok", installed or answer["version"])


def _run(order: bytes, timeout_s: float) -> tuple[int | None, str, str]:
    """Exit code (`None`: killed after `timeout_s`), output and errors of one child.

    Files, not pipes: what the module starts may keep a pipe open.
    """
    with TemporaryFile() as out, TemporaryFile() as err:
        child = subprocess.Popen(
            [sys.executable, str(_CHILD)], stdin=subprocess.PIPE, stdout=out, stderr=err, start_new_session=True
        )
        try:
            with suppress(subprocess.TimeoutExpired):
                child.communicate(order, timeout=timeout_s)
            code = child.returncode
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
        out.seek(0)
        err.seek(0)
        return code, out.read().decode(), err.read().decode(errors="replace")


def _is_present(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ValueError:  # it is imported and has no spec
        return True


def _installed_version(requirement: Requirement) -> str:
    try:
        return version(requirement.distribution or requirement.package)
    except PackageNotFoundError:
        return ""


def _is_older(found: str, wanted: str) -> bool:
    """Whether a version is known and below the one wanted; one that nobody can compare is left to the import."""
    try:
        return bool(found and wanted) and Version(found) < Version(wanted)
    except InvalidVersion:
        return False


def _too_old(requirement: Requirement, found: str) -> ProbeResult:
    detail = f"{requirement.package} {found} is older than {requirement.min_version}"
    return ProbeResult(requirement.module, "too_old", found, detail, requirement.remedy)
