"""Layers of different needs on two real ranks: tokens, explanations and exchanges are the same on both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks
from tiny_models import ragged_prompts
from windowed_models import WindowedLlamaPolicy, greedy, plain_backends, windowed_config, windowed_model

from inference_shardformer import InferenceConfig, ShardConfig, explain
from inference_shardformer.attention.survey import BACKENDS
from inference_shardformer.config.sources import ConfigSources

PROMPTS = ragged_prompts(5, 160, longest=24)
CONFIG = InferenceConfig.model_validate({"dtype": "fp32", "cache": {"block_size": 4, "num_blocks": 40}})


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank said."""
    prompts = tmp_path_factory.mktemp("layered") / "prompts.json"
    Path(prompts).write_text(json.dumps(PROMPTS))
    results = run_ranks("layered_ranks.py", str(prompts), nproc=2, timeout_s=120)
    assert [result.returncode for result in results] == [0, 0], results[-1].stderr[-4000:]
    return [result.said for result in results]


@pytest.mark.parametrize("phase", ["alike", "mixed"])
def test_tokens_are_those_of_hugging_face(said, phase):
    model = windowed_model()
    expected = [greedy(model, prompt, 12) for prompt in PROMPTS]
    assert [rank[phase]["tokens"] for rank in said] == [expected, expected]


def test_every_rank_explains_all_ranks_as_it_would_be_offline(said, tmp_path, monkeypatch):
    monkeypatch.setattr(BACKENDS, "_entries", plain_backends())
    config = windowed_config()
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    offline = explain(
        tmp_path,
        ShardConfig(device="cpu", tp_size=2),
        CONFIG,
        sources=ConfigSources(environ={}),
        policy=WindowedLlamaPolicy(),
    )
    attention = json.loads(json.dumps(offline.to_json()["attention"]))
    assert [rank["alike"]["first"] for rank in said] == [attention, attention]
    assert [(group["layers"], group["ranks"]) for group in attention["groups"]] == [([0, 2], [0, 1]), ([1, 3], [0, 1])]


def test_groups_of_several_backends_are_explained_and_exchanged(said):
    for rank in said:
        first, last = rank["mixed"]["first"], rank["mixed"]["last"]
        assert [group["chosen"] for group in first["groups"]] == ["sdpa", "transposed"]
        assert (last["requested"], {group["chosen"] for group in last["groups"]}) == ("reference", {"reference"})
        assert {tuple(group["ranks"]) for group in last["groups"]} == {(0, 1)}
        assert rank["mixed"]["bound"] == ["reference"] * 4


def test_a_group_that_fails_on_rank_1_keeps_every_group_everywhere(said):
    assert said[0]["mixed"]["errors"] == said[1]["mixed"]["errors"]
    done, failed, done_too = said[0]["mixed"]["errors"]
    assert (done, done_too) == (None, None)
    assert failed.startswith("rank 1: layers 1,3 (4 heads, 2 key/value heads, head_dim 8, float32, window 6): ")
    assert "no such kernel" in failed


def test_a_named_backend_that_misses_a_group_is_refused_alike(said):
    assert said[0]["named"] == said[1]["named"]
    assert "layers 1,3" in said[0]["named"]
    assert "layers 0,2" not in said[0]["named"]
