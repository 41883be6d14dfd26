"""The command `inference-shardformer serve` as a script, for `python` and for `torchrun`."""

from __future__ import annotations

import sys

from inference_shardformer.cli.main import run_as_program

if __name__ == "__main__":
    run_as_program(["serve", *sys.argv[1:]])
