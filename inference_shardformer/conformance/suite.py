"""backend_suite: the kit as a class of pytest tests, one method for each check and one test for each trial."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby

import pytest

from inference_shardformer.attention.base import AttentionBackend
from inference_shardformer.conformance.catalogue import PlannedTrial, plan_suite
from inference_shardformer.conformance.check import MakeBackend, Notes
from inference_shardformer.conformance.verdicts import ConformanceSkip

Record = Callable[[str, object], None]


def backend_suite(backend: type[AttentionBackend], *, make: MakeBackend | None = None) -> type:
    """A class of tests for a backend; assign it to a name that pytest collects: `TestMine = backend_suite(Mine)`.

    `make` constructs the backend for a spec, by default with its options' defaults; give one to test other options:
    `make=lambda spec: Mine(spec, MyOptions(depth=2))`.
    Which tests there are follows from the declared capabilities. Those on a device that is absent are skipped.
    """
    plan = plan_suite(backend, make)
    name = getattr(backend, "name", backend.__qualname__)
    methods = {
        f"test_{check.name}": _method(check.rule, list(trials))
        for check, trials in groupby(plan, key=lambda planned: planned.check)
    }
    return type("BackendSuite", (), {"__doc__": f"Conformance of attention backend {name}.", **methods})


def _method(rule: str, trials: list[PlannedTrial]) -> object:
    params = [
        pytest.param(trial, id=trial.id, marks=[pytest.mark.skip(reason=trial.skip)] if trial.skip else [])
        for trial in trials
    ]

    def test(self: object, trial: PlannedTrial, record_property: Record) -> None:
        __tracebackhide__ = True
        try:
            notes: Notes = trial.body() or {}
        except ConformanceSkip as exc:
            pytest.skip(str(exc))
        for name, value in notes.items():
            record_property(f"conformance.{name}", value)

    test.__doc__ = rule
    return pytest.mark.conformance(pytest.mark.parametrize("trial", params)(test))
