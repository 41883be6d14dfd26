"""The command `inference-shardformer generate` as a script, for `python` and for `torchrun`."""

from __future__ import annotations

import sys

from inference_shardformer.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["generate", *sys.argv[1:]]))
