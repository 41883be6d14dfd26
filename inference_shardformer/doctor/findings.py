"""Findings: the reports of all ranks, what differs between them, and whether a backend can serve."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from inference_shardformer.config.sources import Layers
from inference_shardformer.distributed.environment import RankEnvironment
from inference_shardformer.doctor.collect import collect_report
from inference_shardformer.doctor.compare import Difference, differences, warnings_of
from inference_shardformer.doctor.exchange import Exchange
from inference_shardformer.doctor.report import SCHEMA_VERSION, RankReport
from inference_shardformer.errors import InferenceShardformerError


@dataclass(frozen=True)
class Findings:
    """What all ranks found out. `missing` says why a rank sent no report."""

    reports: tuple[RankReport, ...]
    missing: Mapping[int, str] = field(default_factory=dict)

    @property
    def can_serve(self) -> bool:
        """Whether every rank is there and has backends that can serve all layers, and all of them the same ones."""
        chosen = {report.chosen for report in self.reports}
        all_proven = all(each.can_serve for report in self.reports for each in report.layers)
        return bool(self.reports) and not self.missing and all_proven and len(chosen) == 1

    @property
    def differences(self) -> tuple[Difference, ...]:
        """Facts that ranks should share and do not."""
        return differences(self.reports)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What works and should be looked at."""
        return warnings_of(self.reports)

    def to_json(self) -> dict[str, object]:
        """A stable object for programs."""
        return {
            "schema_version": SCHEMA_VERSION,
            "can_serve": self.can_serve,
            "ranks": [json.loads(report.to_json()) for report in self.reports],
            "missing": {str(rank): why for rank, why in self.missing.items()},
            "differences": [
                {"path": each.path, "values": {str(rank): value for rank, value in each.values.items()}}
                for each in self.differences
            ],
            "warnings": list(self.warnings),
        }


def examine_alone(layers: Layers, model: str | None) -> Findings:
    """The findings of a process that is no rank of a launch, or the only one."""
    return Findings((collect_report(layers, model),))


def examine_ranks(layers: Layers, model: str | None, env: RankEnvironment) -> tuple[Findings, Exchange]:
    """The findings of all ranks of this launch, on each of them; leave the exchange when they have been shown.

    Raises the error of this rank if no rank has a report.
    """
    exchange = Exchange(env.rank, env.world_size)
    outcome: RankReport | InferenceShardformerError
    try:
        outcome = collect_report(layers, model)
    except InferenceShardformerError as exc:
        outcome = exc
    reports, missing = exchange.gather(outcome)
    if isinstance(outcome, InferenceShardformerError) and not reports:
        exchange.leave()
        raise outcome
    return Findings(reports, missing), exchange
