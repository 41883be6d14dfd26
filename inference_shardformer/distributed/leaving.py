"""How a process ends: that of a rank, and that of a command."""

from __future__ import annotations

import atexit
import os
import sys
import threading
from collections.abc import Callable
from types import TracebackType
from typing import NoReturn

_time_to_leave_s = 2.0


def time_to_leave_s() -> float:
    """Seconds between the launcher's request to end, which follows another rank's failure, and the end by force."""
    return _time_to_leave_s


def take_time_to_leave(seconds: float) -> None:
    """Let this process take so long to end once its launcher asks for it: by default there is time to say why."""
    global _time_to_leave_s
    _time_to_leave_s = seconds


def run_and_leave(program: Callable[[], object]) -> NoReturn:
    """Run a program and end the process with its code, without tearing the interpreter down.

    What a program may count on is done: threads are waited for, exit handlers run, streams are flushed. Only objects
    are not let go of one by one, which takes a second where torch and transformers are loaded. In a rank, threads of
    gloo may still hold tensors then, for which they need the interpreter, and torch aborts a process that has none any
    more (pytorch/pytorch#179291).
    """
    with _Ending() as ending:
        program()
    threading._shutdown()  # type: ignore[attr-defined]  # as multiprocessing ends its processes
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:  # closed by whoever started this process
                stream.flush()
        except OSError:  # its reader has gone, or the disk is full
            ending.code = ending.code or 1
    os._exit(ending.code)


class _Ending:
    """What a program ends with, said as the interpreter would say it."""

    code = 0

    def __enter__(self) -> _Ending:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        if isinstance(error, SystemExit) and (error.code is None or isinstance(error.code, int)):
            self.code = (error.code or 0) & 0xFF
        elif isinstance(error, SystemExit):
            self.code = 1
            sys.stderr.write(f"{error.code}\n")
        elif kind is not None and error is not None:
            self.code = 1
            sys.excepthook(kind, error, traceback)
        return True
