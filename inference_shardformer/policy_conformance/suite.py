"""policy_suite: the kit as a class of pytest tests, one method for each check and one test for each trial."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import groupby
from typing import NamedTuple

import pytest

from inference_shardformer.policy_conformance import checks
from inference_shardformer.policy_conformance.subject import (
    MakeConfig,
    MakeModel,
    MakePolicy,
    PolicySubject,
    spread_model,
)

TP_SIZES = (1, 2, 4)


class PolicyTrial(NamedTuple):
    """One test of the kit. `body` raises `ConformanceFailure` where the rule does not hold."""

    check: str
    id: str
    body: Callable[[], None]


def policy_suite(
    policy: MakePolicy,
    configs: Mapping[str, MakeConfig],
    *,
    make_model: MakeModel = spread_model,
    tp_sizes: tuple[int, ...] = TP_SIZES,
) -> type:
    """A class of tests for a policy; assign it to a name that pytest collects: `TestMine = policy_suite(Mine, {...})`.

    `policy` is its class, or gives one; `configs` are small configurations by name, at least one for each architecture
    it announces. `make_model` builds the unsharded model of a configuration, by default with random weights.
    """
    subject = PolicySubject(policy, configs, make_model, tp_sizes)
    methods = {
        f"test_{name}": _method(list(trials)) for name, trials in groupby(policy_trials(subject), lambda t: t.check)
    }
    return type("PolicySuite", (), {"__doc__": f"Conformance of the policy {policy!r}.", **methods})


def policy_trials(subject: PolicySubject) -> Iterator[PolicyTrial]:
    """Every trial, those of one check together."""
    yield PolicyTrial("declares_its_contract", "class", partial(checks.require_contract, subject))
    yield from _of_cases(subject, "facts_are_those_of_the_model", checks.require_facts)
    yield from _of_cases(subject, "impossible_sizes_are_refused", checks.require_refusals)
    yield from _of_sizes(subject, "plan_covers_every_parameter", checks.require_coverage)
    yield from _of_sizes(subject, "verifies", checks.require_sharded_right)
    yield from _of_cases(subject, "forwards_choose_nothing", checks.require_plain_forwards)


def _of_cases(subject: PolicySubject, name: str, check: Callable[[PolicySubject, str], None]) -> Iterator[PolicyTrial]:
    return (PolicyTrial(name, case, partial(check, subject, case)) for case in subject.configs)


def _of_sizes(
    subject: PolicySubject, name: str, check: Callable[[PolicySubject, str, int], None]
) -> Iterator[PolicyTrial]:
    """One trial for each number of ranks that the policy allows; the others are skipped and say why."""
    for case in subject.configs:
        for size in subject.tp_sizes:
            yield PolicyTrial(name, f"{case}-tp{size}", partial(_where_possible, subject, case, size, check))


def _where_possible(
    subject: PolicySubject, case: str, size: int, check: Callable[[PolicySubject, str, int], None]
) -> None:
    problem = subject.policy().tp_size_problem(subject.facts(case), size)
    if problem is not None:
        pytest.skip(f"the policy refuses {size} ranks: {problem}")
    check(subject, case, size)


def _method(trials: list[PolicyTrial]) -> object:
    def test(self: object, trial: PolicyTrial) -> None:
        __tracebackhide__ = True
        trial.body()

    params = [pytest.param(trial, id=trial.id) for trial in trials]
    return pytest.mark.conformance(pytest.mark.parametrize("trial", params)(test))
