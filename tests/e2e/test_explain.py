"""What is said offline equals what the live engine reports, on one rank and on two."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ranks import run_ranks
from tiny_models import save_tiny_model

from inference_shardformer import ConfigSources, InferenceShardformer, ShardConfig, explain

NUM_BLOCKS = "inference.cache.num_blocks"
SETS = ("cache.block_size=8", "cache.num_blocks=70")


@pytest.fixture
def checkpoint(tmp_path: Path) -> tuple[Path, Path]:
    """A model, and a configuration file for it."""
    folder = tmp_path / "model"
    save_tiny_model("gqa_fewer_kv_heads_than_ranks", folder)
    file = tmp_path / "run.yaml"
    file.write_text("shard: {device: cpu}\ninference:\n  dtype: bf16\n  max_model_len: 100\n")
    return folder, file


def comparable(document: dict[str, object]) -> dict[str, object]:
    """The document as JSON, without the notes about one running engine."""
    return json.loads(json.dumps({name: part for name, part in document.items() if name != "notes"}))


def test_one_rank(checkpoint):
    folder, file = checkpoint
    sources = ConfigSources(files=(file,), environ={})
    offline = comparable(explain(folder, ShardConfig(tp_size=1), sources=sources).to_json())
    with InferenceShardformer(ShardConfig(tp_size=1), sources=sources) as shardformer:
        model = shardformer.from_pretrained(folder)
        assert comparable(shardformer.explain().to_json()) == offline
        engine = shardformer.attach(model)
        attached = comparable(shardformer.explain().to_json())
        for mine, live in zip(offline["values"], attached["values"], strict=True):
            if mine["path"] == NUM_BLOCKS:  # what memory was free then
                assert live["value"] == engine.kv_cache.num_blocks == engine.config.get("cache.num_blocks")
                assert live["reason"].startswith("enough for max_num_seqs=64")
            else:
                assert mine == live
                if mine["value"] != "auto":
                    assert engine.config.get(mine["path"]) == mine["value"] or mine["value"] is None
        for part in ("model", "ranks", "attention", "events"):
            assert attached[part] == offline[part]

        engine.update_config({"scheduler.max_num_seqs": 8}, source="test")
        told = {item["path"]: item for item in shardformer.explain().to_json()["values"]}
        assert told["inference.scheduler.max_num_seqs"]["value"] == 8
        assert told["inference.scheduler.max_num_seqs"]["level"] == "update"
        assert told["inference.scheduler.max_num_seqs"]["beaten"][0]["value"] == 64


def test_two_ranks(checkpoint):
    folder, file = checkpoint
    sources = ConfigSources(files=(file,), sets=SETS, environ={})
    offline = comparable(explain(folder, ShardConfig(tp_size=2), sources=sources).to_json())
    results = run_ranks("explain_ranks.py", str(folder), str(file), nproc=2)
    assert [result.returncode for result in results] == [0, 0], [result.stderr for result in results]
    asked = {"value": 2, "origin": "call argument", "level": "call", "reason": ""}
    beaten = [{"value": "auto", "origin": "default", "level": "default"}]
    for rank, result in enumerate(results):
        live, refused = result.lines
        assert offline["values"][0] == {**offline["values"][0], **asked, "beaten": beaten}
        for state in ("sharded", "attached"):
            found = comparable(live[state])
            assert found["values"][0]["value"] == 2  # asked for offline, found by the ranks
            found["values"][0] = offline["values"][0]
            for mine, theirs in zip(offline["values"], found["values"], strict=True):
                if mine["path"] == NUM_BLOCKS and state == "attached":
                    assert theirs == {**mine, "reason": theirs["reason"]}
                else:
                    assert mine == theirs
            found["values"] = offline["values"]
            assert found == offline
        assert live["held"] == offline["ranks"][rank]["weight_bytes"]
        told = {item["path"]: item["value"] for item in offline["values"]}
        assert live["threads"] == told["shard.threads_per_rank"]
        paths = ["inference.max_model_len", "cache.blok_size", "inference.sampling.top_k"]
        assert sorted(refused["paths"]) == sorted(paths)
        assert refused["text"] == results[0].lines[1]["text"]
