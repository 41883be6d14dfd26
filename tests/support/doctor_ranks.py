"""Runs `doctor` on each rank; the second one has other threads and a broken plug-in, or settings that are wrong."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from inference_shardformer.cli.main import main

if __name__ == "__main__":
    kind, folder, *words = sys.argv[1:]
    if os.environ["RANK"] == "1" and kind == "uneven":
        os.environ["OMP_NUM_THREADS"] = "3"
        info = Path(folder) / "uneven-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: uneven\nVersion: 1.2\n")
        (info / "entry_points.txt").write_text("[inference_shardformer.attention_backends]\nplugged = uneven:Backend\n")
        (Path(folder) / "uneven.py").write_text("import os\nos.kill(os.getpid(), 11)\n")
        sys.path.insert(0, folder)
    if os.environ["RANK"] == "1" and kind == "tall":
        words += ["--model", folder]
    sys.exit(main(["doctor", *words]))
