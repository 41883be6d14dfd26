"""No false alarm: every shipped family verifies on 1, 2 and 4 simulated ranks."""

from __future__ import annotations

import pytest
from family_models import FAMILIES, family_model

from inference_shardformer.policies.registry import supported_architectures
from inference_shardformer.verification.verify import verify_sharding


@pytest.mark.parametrize("case", FAMILIES)
def test_a_shipped_family_verifies(case: str) -> None:
    model = family_model(case)
    for tp_size in (1, 2, 4):
        report = verify_sharding(model, tp_size=tp_size)
        assert report.passed, f"tp {tp_size}: {report}"


def test_every_shipped_policy_is_among_them() -> None:
    tested = {type(family_model(case)).__name__ for case in FAMILIES} | {"LlamaForCausalLM"}
    assert set(supported_architectures()) <= tested
