"""launch_ranks: exit codes, silence, and no rank that outlives its launcher, with real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from inference_shardformer.distributed.launch import launch_ranks
from inference_shardformer.errors import ConfigError

SUPPORT = Path(__file__).parents[1] / "support"


def start(*cases: str, cwd: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(SUPPORT)}
    environment.pop("OMP_NUM_THREADS", None)
    return subprocess.Popen(
        [sys.executable, str(SUPPORT / "launching.py"), *cases],
        env=environment,
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, int], dict[str, bool], str, str]:
    """Codes of all launches, whether the parent's environment was kept, and what came out."""
    cases = [
        "launched_ranks,report,--flag,two words,",
        "launched_ranks,exit,0,2",
        "launched_ranks,exit,1,3",
        "launched_ranks,kill,1",
        "no_such_module",
    ]
    with start(*cases, cwd=tmp_path_factory.mktemp("cwd")) as parent:
        out, err = parent.communicate(timeout=300)
    *printed, last = out.splitlines()
    said = json.loads(last)
    return said["codes"], said, "\n".join(sorted(printed)), err


@pytest.mark.parametrize(
    ("case", "code"),
    [
        ("launched_ranks,report,--flag,two words,", 0),
        ("launched_ranks,exit,0,2", 2),
        ("launched_ranks,exit,1,3", 3),
        ("launched_ranks,kill,1", 4),
        ("no_such_module", 1),
    ],
)
def test_the_code_is_that_of_the_rank_that_failed_first(launched: tuple, case: str, code: int) -> None:
    assert launched[0][case] == code


def test_ranks_get_arguments_threads_and_a_safe_path(launched: tuple) -> None:
    threads = str(max(1, len(os.sched_getaffinity(0)) // 2))
    facts = ["2", threads, False, False]
    assert launched[2] == "\n".join(f"rank {rank}: {facts} ['--flag', 'two words', '']" for rank in (0, 1))
    assert launched[1]["environment_kept"]


def test_stderr_holds_what_ranks_say_and_one_line_on_a_signal(launched: tuple) -> None:
    lines = launched[3].splitlines()
    assert {"rank 0 says why", "rank 1 was ended by SIGKILL"} <= set(lines)
    assert sum("No module named no_such_module" in line for line in lines) in (1, 2)
    assert not [line for line in lines if "torch" in line or "Warning" in line or "====" in line]


@pytest.mark.parametrize("to_group", [False, True], ids=["parent", "process group"])
def test_interrupt_ends_all_ranks(tmp_path: Path, to_group: bool) -> None:
    with start(f"launched_ranks,wait,{tmp_path}", cwd=tmp_path) as parent:
        ranks = _wait_for_ranks(tmp_path, parent)
        if to_group:
            os.killpg(parent.pid, signal.SIGINT)
        else:
            parent.send_signal(signal.SIGINT)
        _, err = parent.communicate(timeout=60)
    assert parent.returncode == 130
    assert err == ""
    assert not [pid for pid in ranks if psutil.pid_exists(pid)]


def test_ranks_end_when_the_launcher_is_killed(tmp_path: Path) -> None:
    with start(f"launched_ranks,wait,{tmp_path}", cwd=tmp_path) as parent:
        ranks = _wait_for_ranks(tmp_path, parent)
        parent.kill()
        deadline = time.monotonic() + 60
        while any(_is_running(pid) for pid in ranks) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not [pid for pid in ranks if _is_running(pid)]


def test_no_rank_at_all_is_refused() -> None:
    with pytest.raises(ConfigError, match="nproc=0"):
        launch_ranks([], nproc=0)


def _wait_for_ranks(folder: Path, parent: subprocess.Popen[str]) -> list[int]:
    deadline = time.monotonic() + 60
    while len(list(folder.iterdir())) < 2:
        assert time.monotonic() < deadline
        assert parent.poll() is None
        time.sleep(0.05)
    return [int(path.name) for path in folder.iterdir()]


def _is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
