"""The end of a rank's process: everything is said, and nothing is torn down."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest

from inference_shardformer.cli import main

PROGRAM = r"""
import atexit, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from inference_shardformer.distributed.leaving import run_and_leave

def say(text):
    sys.stdout.write(text + "\n")  # at once

class Kept:
    def __del__(self):
        say("torn down")

kept = Kept()

def program():
    atexit.register(lambda: say("exit handler"))
    threading.Thread(target=lambda: (time.sleep(0.2), say("thread"))).start()
    ThreadPoolExecutor(1).submit(say, "pool")
    say("said")
    {ending}

run_and_leave(program)
"""


@pytest.mark.parametrize(
    ("ending", "code", "error"),
    [
        ("return", 0, ""),
        ("sys.exit()", 0, ""),
        ("sys.exit(3)", 3, ""),
        ("sys.exit('no luck')", 1, "no luck\n"),
        ("raise ValueError('wrong')", 1, "ValueError: wrong\n"),
    ],
)
def test_all_is_said_and_the_code_is_the_programs(ending: str, code: int, error: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(ending=ending)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == code
    assert done.stderr.endswith(error)
    assert sorted(done.stdout.split("\n")) == ["", "exit handler", "pool", "said", "thread"]


def test_every_command_leaves_so(monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[str] = []

    def leave(program: Callable[[], object]) -> None:
        left.append("left")
        program()

    monkeypatch.setattr(main, "run_and_leave", leave)
    with pytest.raises(SystemExit) as ended:
        main.run_as_program(["--version"])
    assert ended.value.code == 0
    assert left == ["left"]
