"""What a rank started by `launch_ranks` does before its module runs: it takes care never to outlive the launcher."""

from __future__ import annotations

import os
import runpy
import select
import signal
import sys
import threading
import time

from inference_shardformer.distributed.leaving import run_and_leave, time_to_leave_s

_POLL_S = 0.5


def main() -> None:
    """Run the module named by the first argument as `__main__`, with the remaining arguments."""
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)  # works while the main thread is in a collective
    signal.signal(signal.SIGTERM, lambda number, frame: _note(wake_write, number))
    threading.Thread(target=_end_with_launcher, args=(wake_read, os.getppid()), daemon=True).start()
    module = sys.argv[1]
    del sys.argv[1]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    run_and_leave(lambda: _run(module))


def _run(module: str) -> None:
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


def _note(wake_write: int, number: int) -> None:
    os.write(wake_write, bytes([number]))


def _end_with_launcher(wake_read: int, launcher: int) -> None:
    while os.getppid() == launcher:
        if select.select([wake_read], [], [], _POLL_S)[0] and signal.SIGTERM in os.read(wake_read, 64):
            time.sleep(time_to_leave_s())
            break
    os._exit(128 + signal.SIGTERM)
