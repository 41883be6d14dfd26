"""Runs a rank program as the process of a rank: `rank_main.py PROGRAM ARGUMENTS`."""

from __future__ import annotations

import runpy
import sys

from inference_shardformer.distributed.leaving import run_and_leave

if __name__ == "__main__":
    del sys.argv[0]
    run_and_leave(lambda: runpy.run_path(sys.argv[0], run_name="__main__"))
