"""launch_ranks: run a module of ours on several local ranks, through torch's elastic launcher but without its noise."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

import psutil
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from inference_shardformer.errors import ConfigError, RankFailure

_logger = logging.getLogger(__name__)
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
_ENDED_BY_LAUNCHER = (-signal.SIGTERM, 128 + signal.SIGTERM)
# `python -c` puts the current directory first on sys.path, where folders of the user would shadow installed packages.
_ENTRY = (
    "import signal, sys\n"
    "signal.signal(signal.SIGINT, signal.SIG_DFL)\n"
    "if sys.path[:1] == ['']: del sys.path[0]\n"
    "from inference_shardformer.distributed.rank_entry import main\n"
    "main()\n"
)


def launch_ranks(argv: Sequence[str], *, nproc: int, module: str = "inference_shardformer.cli.main") -> int:
    """Run `python -m module *argv` on `nproc` ranks of this host, and wait; must be called from the main thread.

    Returns the exit code of the first rank that failed, 4 when a signal ended it, 130 after Ctrl-C, else 0. No rank
    outlives the call.
    """
    if nproc < 1:
        raise ConfigError(f"nproc={nproc} ranks cannot be started; at least 1 is needed", remedy="ask for tp_size >= 1")
    with tempfile.TemporaryDirectory(prefix="inference-shardformer-") as logs, _quiet_elastic(), _as_before(nproc):
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=nproc,
            run_id=str(os.getpid()),
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=0,
            monitor_interval=0.1,
            local_addr="127.0.0.1",
            logs_specs=DefaultLogsSpecs(log_dir=logs),
        )
        try:
            elastic_launch(config, sys.executable)("-u", "-c", _ENTRY, module, *argv)
        except ChildFailedError as exc:
            return _exit_code(exc.failures)
        except KeyboardInterrupt:
            return 128 + signal.SIGINT
        except SignalException as exc:
            return 128 + exc.sigval
    return 0


def _exit_code(failures: Mapping[int, ProcessFailure]) -> int:
    """The code of the rank that failed by itself first; those that the launcher ended then do not count."""
    by_themselves = {rank: f for rank, f in failures.items() if f.exitcode not in _ENDED_BY_LAUNCHER} or failures
    rank, first = min(by_themselves.items(), key=lambda item: item[1].timestamp)
    if first.exitcode > 0:
        return first.exitcode
    _logger.error("rank %d was ended by %s", rank, signal.Signals(-first.exitcode).name)
    return RankFailure.exit_code


@contextmanager
def _quiet_elastic() -> Iterator[None]:
    """Silence torch's launcher: which rank failed and why is said by the ranks themselves."""
    names = [name for name in logging.root.manager.loggerDict if name.startswith("torch.distributed")]
    loggers = [logger for name in names if not (logger := logging.getLogger(name)).disabled]
    for logger in loggers:
        logger.disabled = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger in loggers:
            logger.disabled = False


@contextmanager
def _as_before(nproc: int) -> Iterator[None]:
    """Share the cores between the ranks; afterwards end what is left of them and put this process back as it was."""
    handlers = {number: signal.getsignal(number) for number in _SIGNALS}
    environment = dict(os.environ)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, _num_cores() // nproc)))
    try:
        yield
    finally:
        _end_ranks()
        for number, handler in handlers.items():
            signal.signal(number, handler)
        os.environ.clear()
        os.environ.update(environment)


def _end_ranks() -> None:
    """Kill ranks that torch's launcher left behind, which happens when a second signal interrupts its shutdown."""
    for child in psutil.Process().children():
        with suppress(psutil.Error, ProcessLookupError):
            if _ENTRY in child.cmdline():
                os.killpg(child.pid, signal.SIGKILL)  # every rank leads a session of its own
                child.wait(timeout=5.0)


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
