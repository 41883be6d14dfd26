"""Sides of a comparison: processes that serve workloads given as lines of JSON, and take turns.

A side prints `{"ready": true}` once its model is loaded. It then reads one line for each workload,
`{"prompts": [[...]], "max_new_tokens": [...]}`, generates greedily to exactly these lengths, and answers
`{"seconds": ..., "generated": ..., "rss_mib": ...}`: the time of the generation alone, and the peak of its memory; with
`"file_mib"` the pages of files in it.
Whatever speaks this protocol can be compared, in whatever language or environment it runs.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from benchmarking.workloads import Workload


class SideError(RuntimeError):
    """A side ended, or did not do what it was asked to."""


@dataclass
class Side:
    """One process, or several ranks of which the first is spoken to."""

    name: str
    command: Sequence[str]
    ranks: int = 1
    environment: Mapping[str, str] = field(default_factory=dict)
    peak_rss_mib: float = 0.0
    file_rss_mib: float = 0.0
    _processes: list[subprocess.Popen[str]] = field(default_factory=list)

    def start(self, port: int = 29561) -> None:
        """Start the process and wait until its model is loaded."""
        for rank in range(self.ranks):
            launcher = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": self.ranks, "LOCAL_WORLD_SIZE": self.ranks}
            launched = {**launcher, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} if self.ranks > 1 else {}
            environment = {**os.environ, **self.environment, **{key: str(value) for key, value in launched.items()}}
            self._processes.append(
                subprocess.Popen(
                    self.command,
                    stdin=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
                    stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    text=True,
                    env=environment,
                )
            )
        self._answer()

    def run(self, work: Workload) -> float:
        """The seconds that one workload took."""
        stdin = self._processes[0].stdin
        if stdin is None:
            raise SideError(f"{self.name} was not started")
        stdin.write(json.dumps({"prompts": work.prompts, "max_new_tokens": work.max_new_tokens}) + "\n")
        stdin.flush()
        answer = self._answer()
        if answer["generated"] != work.generated:
            raise SideError(f"{self.name} generated {answer['generated']} tokens instead of {work.generated}")
        self.peak_rss_mib = max(self.peak_rss_mib, float(str(answer.get("rss_mib", 0))))
        self.file_rss_mib = max(self.file_rss_mib, float(str(answer.get("file_mib", 0))))
        return float(str(answer["seconds"]))

    def stop(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.wait()
        self._processes.clear()

    def _answer(self) -> dict[str, object]:
        stdout = self._processes[0].stdout
        while stdout is not None and (line := stdout.readline()):
            if line.startswith("{"):
                return json.loads(line)
        raise SideError(f"{self.name} ended: run its command by hand to see why: {' '.join(self.command)}")


def take_turns(sides: Sequence[Side], works: Mapping[str, Workload], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds by workload and side; in each round every side runs every workload once."""
    seconds: dict[str, dict[str, list[float]]] = {name: {side.name: [] for side in sides} for name in works}
    for name, work in works.items():
        for side in sides:
            side.run(work)  # warm up
        for _ in range(rounds):
            for side in sides:
                seconds[name][side.name].append(side.run(work))
    return seconds


def ratio(mine: Sequence[float], other: Sequence[float]) -> float:
    """How many times longer the other side takes: the median over rounds."""
    return statistics.median(b / a for a, b in zip(mine, other, strict=True))
