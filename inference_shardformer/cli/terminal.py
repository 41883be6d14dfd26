"""What a command shows: results on standard output, everything else on standard error, both on the main rank alone."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

Progress = Callable[[int, int], None]


class Terminal:
    """The output of one command on one rank; silent on every rank but the main one."""

    def __init__(self, *, is_main: bool) -> None:
        self.is_main = is_main

    def note(self, line: str = "") -> None:
        """A line on standard error."""
        if self.is_main:
            print(line, file=sys.stderr, flush=True)

    def text(self, text: str) -> None:
        """Text on standard output, as it is."""
        if self.is_main:
            print(text, end="", flush=True)

    def prompt(self, prompt: str) -> None:
        """A prompt on standard error: on a terminal its text follows on the same line, else it gets a line."""
        if self.is_main and sys.stdout.isatty() and sys.stderr.isatty():
            print(prompt, end="", file=sys.stderr, flush=True)
        else:
            self.note(f"prompt     {prompt if len(prompt) <= 80 else prompt[:77] + '...'}")

    def record(self, record: object) -> None:
        """One JSON object as a line of standard output."""
        if self.is_main:
            print(json.dumps(record), flush=True)

    @contextmanager
    def loading(self) -> Iterator[Progress | None]:
        """Report loading: a bar where standard error is a terminal, else one line at the end."""
        if not self.is_main:
            yield None
            return
        num_bytes = 0
        started = time.perf_counter()
        with _bar() if sys.stderr.isatty() else nullcontext(_ignore) as show:

            def progress(done: int, expected: int) -> None:
                nonlocal num_bytes
                num_bytes = done
                show(done, expected)

            yield progress
        seconds = time.perf_counter() - started
        self.note(f"loaded     {num_bytes / 1e6:.1f} MB of weights on rank 0; ready after {seconds:.1f} s")


@contextmanager
def _bar() -> Iterator[Progress]:
    """A progress bar on standard error that vanishes when it is done."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    columns = (TextColumn("loading weights"), BarColumn(), DownloadColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("load", total=None)
        yield lambda done, expected: progress.update(task, completed=done, total=expected)


def _ignore(done: int, expected: int) -> None:
    """Progress that nobody watches."""
