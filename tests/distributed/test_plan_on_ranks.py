"""Planned bytes equal measured bytes, and real ranks load by a plan file: weights, cache, every step's collectives."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from family_models import greedy, save_family_model
from ranks import run_ranks
from tiny_models import hf_greedy, save_tiny_model

from inference_shardformer import ConfigSources, InferenceConfig, ShardConfig, plan_model

NOTHING = ConfigSources(environ={})
CASES = ("mha", "gqa_fewer_kv_heads_than_ranks", "odd_vocabulary", "odd_vocabulary_tied", "biased")
FAMILIES = ("mixtral", "qwen3_moe", "gpt_neox", "gemma2", "phi3", "opt")
PROMPTS = [[3, 17, 5, 90, 41, 7], [9], [22, 60, 4]]
INFERENCE = InferenceConfig.model_validate(
    {"dtype": "fp32", "cache": {"block_size": 4}, "attention": {"backend": "reference"}}
)


@pytest.mark.parametrize("tp_size", [2, 4])
def test_planned_bytes_are_the_measured_bytes(tmp_path: Path, tp_size: int) -> None:
    models = {case: save_tiny_model(case, tmp_path / case) for case in CASES}
    models |= {case: save_family_model(case, tmp_path / case) for case in FAMILIES}
    plans = {}
    for case in models:
        plans[case] = plan_model(tmp_path / case, ShardConfig(tp_size=tp_size), INFERENCE, sources=NOTHING)
        plans[case].file.write(tmp_path / case / "plan.json")
    _exchange_parts(tmp_path / "gqa_fewer_kv_heads_than_ranks" / "plan.json")
    other = plan_model(tmp_path / sorted(CASES)[0], ShardConfig(tp_size=1), INFERENCE, sources=NOTHING)
    other.file.write(tmp_path / "other.json")

    continued = {case: hf_greedy if case in CASES else greedy for case in models}
    expected = {case: sorted(continued[case](models[case], each, 5) for each in PROMPTS) for case in models}
    ranks = run_ranks("plan_ranks.py", str(tmp_path), json.dumps(PROMPTS), nproc=tp_size, timeout_s=300)
    for number, rank in enumerate(ranks):
        assert rank.returncode == 0, rank.stderr[-4000:]
        measured, refused = rank.lines
        for case, plan in plans.items():
            found, kv = measured[case], plan.kv_cache
            assert found["held"] == plan.rank_bytes[number], case
            assert found["kv_cache"] == found["num_blocks"] * kv.bytes_per_block, case
            assert kv.bytes_per_block == 4 * kv.bytes_per_token
            _check_steps(found, plan.traffic)
            assert sorted(found["outputs"]) == expected[case], case
        unfit, uneven = refused
        assert unfit["error"] == "PlanFileError"
        assert f"made for tp_size 1, and the model is loaded on {tp_size} rank(s)" in unfit["message"]
        assert uneven["error"] == "EnvironmentMismatchError"
        assert "the plan file" in uneven["message"]


def _exchange_parts(path: Path) -> None:
    """Give the ranks each other's parts of the first layer: the sums of the layer stay the same."""
    document = json.loads(path.read_text())
    for name, entry in document["parameters"].items():
        if name.startswith("model.layers.0."):
            entry["ranks"].reverse()
    path.write_text(json.dumps(document))


def _check_steps(found, traffic) -> None:
    first, *others = found["steps"]
    assert first["tokens"] == sum(map(len, PROMPTS))
    assert first["bytes"]["all_reduce"] == first["tokens"] * traffic.num_bytes("token")
    assert first["bytes"]["all_gather"] == first["rows"] * traffic.num_bytes("sequence")
    assert len(others) >= 4
    for step in others:  # no request comes in any more
        assert sum(step["bytes"].values()) == traffic.step_bytes(step["tokens"], step["rows"])
        by_collective = Counter()
        for each in traffic.exchanges:
            times = {"token": step["tokens"], "sequence": step["rows"], "step": 1, "drawn sequence": 0}[each.unit]
            by_collective[each.collective] += times * each.num_bytes
        assert step["bytes"] == by_collective
    drawn = {each.collective: each.num_bytes for each in traffic.exchanges if each.unit == "drawn sequence"}
    assert found["drawn"]["all_gather"] == drawn["all_gather"]
    assert found["drawn"]["broadcast"] % 1024 == drawn["broadcast"]
    assert found["drawn"]["all_reduce"] == len(PROMPTS[0]) * traffic.num_bytes("token")
