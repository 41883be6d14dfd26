"""The standard streams, which whoever starts a program may have closed."""

from __future__ import annotations

import os
import sys


def open_standard_streams() -> None:
    """Let streams that are closed lead nowhere, here and in processes started from here.

    Else `print` writes to standard output what is meant for a closed standard error, and the next file that is opened
    gets the number of a standard stream, and with it what others write there.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is not None:
            continue
        nowhere = os.open(os.devnull, os.O_RDWR)
        if nowhere == number:
            os.set_inheritable(number, True)
        else:
            os.dup2(nowhere, number)
            os.close(nowhere)
        setattr(sys, name, os.fdopen(number, "r" if number == 0 else "w", closefd=False))
