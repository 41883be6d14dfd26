"""Which rank this process is, read from the launcher's variables without importing torch."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from inference_shardformer.cli.report import EXIT_INTERRUPTED, LostRankError
from inference_shardformer.config.shard import ShardConfig

_LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_REPORTED_VARIABLE = "SHARDFORMER_COMMAND_REPORTED"  # a file; not under the prefix that is reserved for settings
_EXIT_TERMINATED = 128 + signal.SIGTERM


def is_launched() -> bool:
    """Whether torchrun (or our own launcher) started this process as one of its ranks."""
    return all(os.environ.get(name) for name in _LAUNCHER_VARIABLES)


def is_main_rank() -> bool:
    """Whether this process is the one that prints."""
    return not is_launched() or os.environ["RANK"] == "0"


def name_of_other_rank() -> str:
    """Who speaks where it is not the main rank."""
    return "" if is_main_rank() else f"rank {os.environ['RANK']}: "


def has_launcher_of_ours() -> bool:
    """Whether a command of ours started this rank; that command then speaks about what ends all ranks at once."""
    return _REPORTED_VARIABLE in os.environ


def note_reported(code: int) -> None:
    """Tell the command that started this rank that it ends with this code; unless that is 0, an error was shown."""
    if has_launcher_of_ours():
        Path(os.environ[_REPORTED_VARIABLE]).write_text(str(code), encoding="ascii")


def ranks_to_launch(shard: ShardConfig) -> int:
    """How many ranks this process must start; 0 if it is to run the model itself."""
    wanted = 1 if shard.tp_size == "auto" else shard.tp_size
    return wanted if wanted > 1 and not is_launched() else 0


def launch(words: Sequence[str], *, num_ranks: int) -> int:
    """Run this command line on `num_ranks` ranks of this machine; their exit code.

    The main rank reports errors. Raises `LostRankError` when it had no chance to. Where SIGTERM ended the launcher,
    the code is that with which the main rank ended by itself.
    """
    from inference_shardformer.distributed.launch import launch_ranks

    with TemporaryDirectory(prefix="inference-shardformer-") as folder:
        reported = Path(folder) / "reported"
        os.environ[_REPORTED_VARIABLE] = str(reported)
        try:
            code = launch_ranks(words, nproc=num_ranks)
        finally:
            del os.environ[_REPORTED_VARIABLE]
        if code == EXIT_INTERRUPTED:
            raise KeyboardInterrupt
        said = int(reported.read_text(encoding="ascii")) if reported.exists() else None
        if code == _EXIT_TERMINATED and said is not None:
            return said
        if code == _EXIT_TERMINATED:
            raise LostRankError(
                f"the {num_ranks} ranks were told to end (SIGTERM)",
                remedy="nothing is wrong here; see who ended the command or one of its ranks",
            )
        if code and not said:
            raise LostRankError(
                f"one of the {num_ranks} ranks ended without a report (exit code {code})",
                remedy="see the lines above; a rank that is killed often means that memory ran out: lower "
                "cache.memory_limit or use a smaller model",
            )
    return code
