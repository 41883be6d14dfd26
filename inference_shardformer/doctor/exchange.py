"""Brings the reports of all ranks together through the launcher's store, which needs no working process group."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from typing import NamedTuple

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from inference_shardformer.doctor.report import RankReport
from inference_shardformer.errors import EnvironmentMismatchError, InferenceShardformerError

_REPORT, _ERROR = "report", "error"
_SILENT = "it sent no report within a minute: it ended, or it is stuck; see what it printed"
_PREFIX = "inference_shardformer.doctor"
_PATIENCE = timedelta(seconds=60)
_GOODBYE = timedelta(seconds=5)


class Gathered(NamedTuple):
    """The reports that came, in order of their ranks, and why there is none of the others."""

    reports: tuple[RankReport, ...]
    missing: Mapping[int, str]


class Exchange:
    """The meeting of the ranks of one launch. Every rank makes one, gathers, and leaves."""

    def __init__(self, rank: int, world_size: int) -> None:
        self._rank, self._size = rank, world_size
        try:
            store, _, _ = next(iter(rendezvous("env://", timeout=_PATIENCE)))
        except (dist.DistError, RuntimeError, ValueError, OSError) as exc:
            raise EnvironmentMismatchError(
                f"rank {rank} cannot reach the launcher's store: {exc}",
                remedy="start every rank with torchrun, and let them reach MASTER_ADDR:MASTER_PORT",
            ) from exc
        self._store = dist.PrefixStore(_PREFIX, store)

    def gather(self, outcome: RankReport | InferenceShardformerError) -> Gathered:
        """Every rank's report, on every rank; of a rank that failed its error, of one that is silent a sentence."""
        is_report = isinstance(outcome, RankReport)
        self._store.set(f"{_REPORT if is_report else _ERROR}/{self._rank}", _text(outcome))
        self._store.set(f"sent/{self._rank}", _REPORT if is_report else _ERROR)
        reports, missing = [], {}
        for rank in range(self._size):
            try:
                self._store.wait([f"sent/{rank}"], _PATIENCE)
            except (dist.DistError, RuntimeError):
                missing[rank] = _SILENT
                continue
            kind = self._store.get(f"sent/{rank}").decode()
            text = self._store.get(f"{kind}/{rank}").decode()
            if kind == _REPORT:
                reports.append(RankReport.from_json(text))
            else:
                missing[rank] = text
        return Gathered(tuple(reports), missing)

    def leave(self) -> None:
        """Wait until the main rank has said everything; the main rank waits until the others know."""
        with suppress(dist.DistError, RuntimeError):  # a rank that is gone needs no goodbye
            if self._rank == 0:
                self._store.set("said", "")
                self._store.wait([f"left/{rank}" for rank in range(1, self._size)], _GOODBYE)
            else:
                self._store.wait(["said"], _PATIENCE)
                self._store.set(f"left/{self._rank}", "")


def _text(outcome: RankReport | InferenceShardformerError) -> str:
    return outcome.to_json() if isinstance(outcome, RankReport) else str(outcome)
