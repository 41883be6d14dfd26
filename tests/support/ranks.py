"""Runs a rank program in several real processes and reads what each rank has to say, as lines of JSON."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SUPPORT = Path(__file__).parent


@dataclass(frozen=True)
class RankResult:
    """How one rank ended, and the lines of its output, decoded."""

    returncode: int
    lines: list[Any]
    stderr: str

    @property
    def said(self) -> Any:
        """The last line."""
        assert self.lines, f"a rank ended with {self.returncode} and said nothing: {self.stderr[-4000:]}"
        return self.lines[-1]


def run_ranks(program: str, *arguments: str, nproc: int, timeout_s: float = 150.0) -> list[RankResult]:
    """Run `tests/support/<program>` on `nproc` ranks with torchrun's variables; fails when a rank hangs."""
    port = free_port()
    ranks = [_start(program, arguments, rank, nproc, port) for rank in range(nproc)]
    began = time.monotonic()
    try:
        return [_result(rank, began, timeout_s) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


def free_port() -> int:
    """A port nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def _start(program: str, arguments: tuple[str, ...], rank: int, nproc: int, port: int) -> subprocess.Popen[str]:
    environment = {
        "RANK": str(rank),
        "WORLD_SIZE": str(nproc),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(nproc),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "PYTHONFAULTHANDLER": "1",
    }
    return subprocess.Popen(
        [sys.executable, str(SUPPORT / "rank_main.py"), str(SUPPORT / program), *arguments],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _result(rank: subprocess.Popen[str], began: float, timeout_s: float) -> RankResult:
    out, err = rank.communicate(timeout=max(0.1, began + timeout_s - time.monotonic()))
    return RankResult(rank.returncode, [json.loads(line) for line in out.splitlines()], err)
