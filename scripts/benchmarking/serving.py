"""The loop of a side: read workloads from standard input, answer on standard output."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

from benchmarking.memory import file_rss_mib, peak_rss_mib
from benchmarking.workloads import Workload

Serve = Callable[[Workload], tuple[float, int]]
"""Seconds and generated tokens of one workload."""


def serve(run: Serve) -> None:
    """Answer workloads until standard input ends."""
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        seconds, generated = run(Workload(**json.loads(line)))
        memory = {"rss_mib": peak_rss_mib(), "file_mib": file_rss_mib()}
        print(json.dumps({"seconds": seconds, "generated": generated, **memory}), flush=True)
