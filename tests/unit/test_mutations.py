"""Seeded defects: the verifier finds every one, and names the right module for at least 95 of 100."""

from __future__ import annotations

import pytest
from family_models import FAMILIES, family_model
from mutations import MUTATIONS, Mutation
from tiny_models import tiny_model

from inference_shardformer.policies.registry import policy_for
from inference_shardformer.verification.report import VerificationReport
from inference_shardformer.verification.verify import verify_sharding


def verify(mutation: Mutation) -> VerificationReport:
    model = family_model(mutation.case) if mutation.case in FAMILIES else tiny_model(mutation.case)
    policy = mutation.inject(policy_for(type(model).__name__))
    return verify_sharding(model, policy=policy, tp_size=mutation.tp_size)


_NAMED: dict[str, bool] = {}


@pytest.mark.parametrize("name", MUTATIONS)
def test_every_defect_is_found(name: str) -> None:
    mutation = MUTATIONS[name]
    report = verify(mutation)
    assert not report.passed, f"{name} was not found"
    assert report.first is not None
    _NAMED[name] = report.first.module in mutation.expected


def test_the_right_module_is_named() -> None:
    assert len(_NAMED) == len(MUTATIONS) >= 30, "needs the tests above"
    wrong = [name for name, is_named in _NAMED.items() if not is_named]
    assert len(wrong) <= 0.05 * len(_NAMED), wrong
