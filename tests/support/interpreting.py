"""Runs tests of Triton kernels in a process of its own, where Triton's interpreter is on from the first import."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
_PROBE = """
import sys, torch, triton, triton.language as tl

@triton.jit
def fill(out, SIZE: tl.constexpr):
    tl.store(out + tl.arange(0, SIZE), 1.0)

out = torch.zeros(4)
fill[(1,)](out, SIZE=4)
sys.exit(0 if out.sum() == 4 else 3)
"""


def interpreter_problem(folder: Path) -> str | None:
    """Why kernels cannot be interpreted here; `None` if they can. Triton 3.1 stores nothing beside NumPy 2."""
    script = folder / "probe.py"  # the interpreter reads the source of kernels from their file
    script.write_text(_PROBE)
    done = subprocess.run(
        [sys.executable, str(script)], env=_environment(), capture_output=True, text=True, check=False
    )
    return None if done.returncode == 0 else f"Triton's interpreter does not work here: {done.stderr[-200:]}"


def run_interpreted(path: Path, timeout_s: float = 600) -> int:
    """Run one file of tests; returns how many passed, and fails with its output if one did not."""
    command = [sys.executable, "-m", "pytest", "-q", "-W", "ignore::DeprecationWarning", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, str(path)],
        env=_environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout_s,
    )
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
    return done.stdout.count(".")


def _environment() -> dict[str, str]:
    """This one, with the interpreter on, one thread, and the repository's root not on the import path."""
    return {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
