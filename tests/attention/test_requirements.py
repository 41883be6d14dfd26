"""What backends refuse: one reason for each fact that a spec asks too much of, with the values and a remedy."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from inference_shardformer.attention.base import AttentionBackend, AttentionCapabilities, Feature, Reason, Sizes
from inference_shardformer.attention.reference import ReferenceAttention
from inference_shardformer.attention.requirements import capability_reasons
from inference_shardformer.attention.sdpa import SdpaAttention
from inference_shardformer.conformance.cases import MIXED, Case

SOUND = Case(MIXED).spec(torch.device("cpu"))
NARROW = AttentionCapabilities(
    devices=("cuda", "xpu"),
    dtypes=(torch.bfloat16,),
    kv_dtypes=(torch.float8_e5m2,),
    head_dims=Sizes.only(64, 128),
    block_sizes=Sizes.multiples_of(16, high=256),
    gqa_ratios=Sizes(low=2, high=4),
)
SERVED = replace(
    SOUND,
    dtype=torch.bfloat16,
    device=torch.device("xpu"),
    head_dim=64,
    block_size=32,
    num_heads=8,
    num_kv_heads=2,
    features=frozenset(),
)


@pytest.mark.parametrize("backend", [SdpaAttention, ReferenceAttention])
@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"num_heads": 7}, "head_counts", "num_heads=7 is not a multiple of num_kv_heads=2"),
        ({"num_kv_heads": 0}, "shape", "num_kv_heads=0 is below 1"),
        ({"head_dim": 0}, "shape", "head_dim=0 is below 1"),
        ({"block_size": 0}, "shape", "block_size=0 is below 1"),
        ({"sliding_window": 0}, "shape", "sliding_window=0 is below 1"),
        ({"dtype": torch.float64}, "dtype", "dtype float64 is not among float32, bfloat16, float16"),
        ({"dtype": torch.int8}, "dtype", "dtype int8"),
        ({"kv_dtype": torch.bfloat16}, "kv_dtype", "keys and values in bfloat16 are not among float32"),
        ({"device": torch.device("meta")}, "device", "device type meta is not cpu or cuda"),
        ({"features": frozenset({Feature.GRAPHS})}, "feature_graphs", "needs graphs, which it does not have"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_one_broken_rule_gives_one_reason(
    backend: type[AttentionBackend], changes: dict[str, object], code: str, words: str
) -> None:
    (reason,) = backend.reasons(replace(SOUND, **changes))
    assert reason.code == code
    assert words in reason.message
    assert reason.remedy


def test_all_broken_rules_are_reported_together() -> None:
    broken = replace(SOUND, num_heads=7, dtype=torch.float64, device=torch.device("meta"))
    assert [reason.code for reason in SdpaAttention.reasons(broken)] == ["head_counts", "dtype", "device"]


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"head_dim": 80}, "head_dim", "head_dim=80 is not 64 or 128"),
        ({"block_size": 8}, "block_size", "block_size=8 is not a multiple of 16 from 1 to 256"),
        ({"block_size": 272}, "block_size", "block_size=272"),
        ({"num_heads": 2}, "gqa_ratio", "gqa_ratio=1 is not any size from 2 to 4"),
        ({"num_heads": 10}, "gqa_ratio", "gqa_ratio=5"),
        ({"kv_dtype": torch.int8}, "kv_dtype", "int8 are not among bfloat16, float8_e5m2"),
        ({"device": torch.device("cpu")}, "device", "device type cpu is not cuda or xpu"),
        ({"sliding_window": 9}, "feature_sliding_window", "sliding_window=9 needs sliding_window"),
        ({"softcap": 2.5}, "feature_softcap", "softcap=2.5 needs softcap"),
        ({"sinks": True}, "feature_sinks", "attention sinks needs sinks"),
        ({"features": frozenset({Feature.MIXED_BATCH})}, "feature_mixed_batch", "in one batch needs mixed_batch"),
        ({"features": frozenset({Feature.CHUNKED_PREFILL})}, "feature_chunked_prefill", "prompts in pieces"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_fact_that_is_not_met_has_its_code(changes: dict[str, object], code: str, words: str) -> None:
    assert capability_reasons(NARROW, SERVED) == []
    (reason,) = capability_reasons(NARROW, replace(SERVED, **changes))
    assert reason.code == code
    assert words in reason.message
    assert reason.remedy


@pytest.mark.parametrize("softcap", [0.0, -1.0, float("inf"), float("nan")])
def test_a_cap_is_a_finite_number_above_zero(softcap: float) -> None:
    (reason,) = ReferenceAttention.reasons(replace(SOUND, softcap=softcap))
    assert reason.code == "shape"


def test_a_declared_kv_dtype_is_served() -> None:
    assert capability_reasons(NARROW, replace(SERVED, kv_dtype=torch.float8_e5m2)) == []


def test_extra_reasons_come_after_the_facts_and_not_for_unsound_counts() -> None:
    class Odd(ReferenceAttention):
        @classmethod
        def extra_reasons(cls, spec):
            return [Reason("ratio", f"{spec.num_heads / spec.num_kv_heads}", "another ratio")]

    assert [reason.code for reason in Odd.reasons(replace(SOUND, dtype=torch.int8))] == ["dtype", "ratio"]
    assert [reason.code for reason in Odd.reasons(replace(SOUND, num_kv_heads=0))] == ["shape"]
