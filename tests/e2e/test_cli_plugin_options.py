"""The command line with plug-ins that a distribution brings: their options are validated, explained and migrated."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import GraniteConfig

PLUGINS = """
from dataclasses import replace

from pydantic import BaseModel, ConfigDict, Field

from inference_shardformer.attention.base import OptionChange, OptionsStep
from inference_shardformer.attention.reference import ReferenceAttention
from inference_shardformer.policies.llama import LlamaPolicy


class RockPolicy(LlamaPolicy):
    contract_version = 1
    architectures = ("GraniteForCausalLM",)
    options_version = 2
    options_steps = {1: OptionsStep("the context has a name", renamed={"ctx": "context"}, dropped={"debug": "unused"})}

    class Options(BaseModel):
        model_config = ConfigDict(frozen=True, extra="forbid")
        context: int = Field(default=50, ge=1, description="Tokens.")

    def facts(self, hf_config):
        return replace(super().facts(hf_config), max_position_embeddings=self.options.context)


class TileOptions(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    blocks: int = 1


class Tiled(ReferenceAttention):
    name = "tiled"
    Options = TileOptions
    options_version = 2
    options_steps = {1: OptionsStep("blocks", changed={"tile": OptionChange("tokens", lambda n: {"blocks": n // 16})})}
"""
OLD = """\
shard:
  tp_size: 2
  policy: {options: {rock: {ctx: 40, debug: true}}}
inference:
  attention:
    backend: tiled
    options: {tiled: {tile: 64}}
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What installing a distribution with both plug-ins leaves behind, and a model that only its policy serves."""
    folder = tmp_path_factory.mktemp("site")
    info = folder / "quarry-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: quarry\nVersion: 1.2\n")
    groups = {"policies": "rock = quarry:RockPolicy", "attention_backends": "tiled = quarry:Tiled"}
    lines = [f"[inference_shardformer.{group}]\n{line}\n" for group, line in groups.items()]
    (info / "entry_points.txt").write_text("".join(lines))
    (folder / "quarry.py").write_text(PLUGINS)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = GraniteConfig(vocab_size=64, num_hidden_layers=1, max_position_embeddings=128, **sizes)
    config.architectures = ["GraniteForCausalLM"]
    config.save_pretrained(folder / "model")
    return folder


def command(site: Path, *words: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-m", "inference_shardformer.cli.main", *words],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_an_old_file_is_refused_migrated_and_explained(site, tmp_path):
    old, new = tmp_path / "old.yaml", tmp_path / "new.yaml"
    old.write_text(OLD)
    model = ("--model", str(site / "model"))

    refused = command(site, "explain", *model, "--config", str(old))
    assert refused.returncode == 2
    for said in ("options.rock.ctx", "options.rock.debug", "options.tiled.tile", "old.yaml:3"):
        assert said in refused.stderr
    assert "the name of an option of policy rock: context" in refused.stderr

    migrated = command(site, "migrate", str(old), "--to", str(new), "--json")
    assert migrated.returncode == 0, migrated.stderr
    report = json.loads(migrated.stdout)
    assert report["config"]["shard"]["policy"]["options"] == {"rock": {"options_version": 2, "context": 40}}
    assert report["config"]["inference"]["attention"]["options"] == {"tiled": {"options_version": 2, "blocks": 4}}
    for kind, name in (("renamed", "rock.ctx"), ("changed", "tiled.tile"), ("dropped", "rock.debug")):
        assert [entry["name"].rpartition("options.")[2] for entry in report[kind]] == [name]

    again = command(site, "migrate", str(new), "--to", str(new))
    assert "nothing to migrate" in again.stderr

    explained = command(site, "explain", *model, "--config", str(new), "--json")
    assert explained.returncode == 0, explained.stderr
    values = {item["path"]: item for item in json.loads(explained.stdout)["values"]}
    assert values["shard.policy.options.rock.context"]["value"] == values["inference.max_model_len"]["value"] == 40
    assert values["inference.attention.options.tiled.blocks"]["origin"].startswith(f"file {new}:")


def test_a_newer_version_is_refused_by_name(site, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("schema_version: 1\nshard: {policy: {options: {rock: {options_version: 3, context: 4}}}}\n")
    migrated = command(site, "migrate", str(file), "--to", str(file))
    assert migrated.returncode == 2
    assert "at most 2, the version of the installed policy rock" in " ".join(migrated.stderr.split())
    assert "options_version: 3" in file.read_text()
