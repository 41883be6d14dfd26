"""run_suite: the kit without pytest, for tools and for tests of the kit itself."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from inference_shardformer.attention.base import AttentionBackend
from inference_shardformer.conformance.catalogue import PlannedTrial, plan_suite
from inference_shardformer.conformance.check import MakeBackend, Notes
from inference_shardformer.conformance.verdicts import ConformanceFailure, ConformanceSkip


class Outcome(NamedTuple):
    """How one trial ended. `message` is why it failed or was skipped, `notes` what it measured."""

    check: str
    id: str
    status: Literal["passed", "failed", "skipped"]
    message: str
    notes: Notes


@dataclass(frozen=True)
class SuiteResult:
    """Every outcome, in order."""

    backend: str
    outcomes: list[Outcome] = field(default_factory=list)

    @property
    def failures(self) -> dict[str, str]:
        """Messages of the failed trials, by `check[id]`."""
        return {f"{each.check}[{each.id}]": each.message for each in self.outcomes if each.status == "failed"}

    @property
    def failed_checks(self) -> frozenset[str]:
        """Names of the checks with a failed trial."""
        return frozenset(each.check for each in self.outcomes if each.status == "failed")


def run_suite(
    backend: type[AttentionBackend],
    *,
    make: MakeBackend | None = None,
    only: Collection[str] | None = None,
    without: Collection[str] = (),
) -> SuiteResult:
    """Run every check on a backend, or `only` the named ones, `without` others; nothing is raised for a failure."""
    result = SuiteResult(getattr(backend, "name", backend.__qualname__))
    for planned in plan_suite(backend, make):
        if planned.check.name not in without and (only is None or planned.check.name in only):
            result.outcomes.append(_outcome(planned))
    return result


def _outcome(planned: PlannedTrial) -> Outcome:
    place = planned.check.name, planned.id
    if planned.skip:
        return Outcome(*place, "skipped", planned.skip, {})
    try:
        notes = planned.body()
    except ConformanceSkip as exc:
        return Outcome(*place, "skipped", str(exc), {})
    except ConformanceFailure as exc:
        return Outcome(*place, "failed", str(exc), {})
    except Exception as exc:  # noqa: BLE001  # foreign code on trial may raise anything, which is a failure
        return Outcome(*place, "failed", f"{type(exc).__name__}: {exc}", {})
    return Outcome(*place, "passed", "", notes or {})
