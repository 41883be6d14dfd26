"""Standard streams that are closed: what is meant for them goes nowhere, least of all into another stream."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """
import os, subprocess, sys
from inference_shardformer.cli.streams import open_standard_streams
from inference_shardformer.distributed.leaving import run_and_leave

open_standard_streams()
opened = os.open(os.devnull, os.O_RDONLY)
print("a result", flush=True)
print("a note", file=sys.stderr, flush=True)
subprocess.run(["sh", "-c", "echo a result; echo a note >&2; read line; true"], check=True)
assert opened > 2
run_and_leave(lambda: None)
"""


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1, 2)])
def test_closed_streams_lead_nowhere(closed: tuple[int, ...]) -> None:
    redirections = "".join(f" {number}{'<' if number == 0 else '>'}&-" for number in closed)
    command = f'exec "$0" -c "$1"{redirections}'
    done = subprocess.run(
        ["sh", "-c", command, sys.executable, PROGRAM], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ("" if 1 in closed else "a result\n" * 2)
    assert done.stderr == ("" if 2 in closed else "a note\n" * 2)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no full device")
def test_a_rank_that_cannot_write_ends_with_an_error_and_without_a_traceback() -> None:
    program = (
        "import sys\nfrom inference_shardformer.distributed.leaving import run_and_leave\n"
        "run_and_leave(lambda: print('lost'))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", program],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
            env=environment,
        )
    assert (done.returncode, done.stderr) == (1, "")
