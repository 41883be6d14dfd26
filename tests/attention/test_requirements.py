"""What backends refuse: one reason for each broken rule, with the values and a remedy."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attention_batches import Case

from inference_shardformer.attention.base import AttentionBackend
from inference_shardformer.attention.reference import ReferenceAttention
from inference_shardformer.attention.sdpa import SdpaAttention

SOUND = Case(()).spec(torch.float32)


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
        ({"device": torch.device("meta")}, "device", "device type meta is not cpu or cuda"),
        ({"device": torch.device("cuda", 99)}, "device_missing", "device cuda:99 does not exist"),
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
