"""A module for `launch_ranks`: does on each rank what its argument says."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path


def main() -> None:
    rank = int(os.environ["RANK"])
    match sys.argv[1:]:
        case ["report", *rest]:
            facts = [
                os.environ["WORLD_SIZE"],
                os.environ["OMP_NUM_THREADS"],
                str(Path.cwd()) in sys.path,
                "" in sys.path,
            ]
            sys.stdout.write(f"rank {rank}: {facts} {rest}\n")  # at once: ranks share the pipe
        case ["exit", culprit, code]:
            if rank == int(culprit):
                sys.exit(int(code))
            time.sleep(60)
        case ["kill", culprit]:
            others = Path("others-are-ready")
            while rank == int(culprit):
                if others.exists():  # a rank that has not begun cannot say why
                    os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(0.01)
            others.touch()
            time.sleep(0.5)
            sys.stderr.write(f"rank {rank} says why\n")
            sys.exit(4)
        case ["wait", folder]:
            Path(folder, f"{os.getpid()}").touch()
            time.sleep(60)


if __name__ == "__main__":
    main()
