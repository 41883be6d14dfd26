"""A config.json that cannot be right is refused by name, before weights are read; nothing in it ends in a traceback."""

from __future__ import annotations

import json

import pytest
from tiny_models import tiny_config

from inference_shardformer import ConfigSources, explain
from inference_shardformer.cli.main import main
from inference_shardformer.errors import CheckpointError

WRONG = [
    ({"hidden_act": "nosuch"}, "nosuch"),
    ({"num_attention_heads": 0, "num_key_value_heads": 0}, "config.json"),
    ({"max_position_embeddings": -1}, "max_position_embeddings=-1: must be at least 1"),
    ({"num_hidden_layers": 0}, "num_hidden_layers=0: must be at least 1"),
    ({"num_key_value_heads": 3}, "num_attention_heads=8 is not a multiple of num_key_value_heads=3"),
    ({"hidden_size": "64"}, "config.json"),
]


@pytest.fixture
def write(tmp_path):
    def write(changed):
        config = {**tiny_config("gqa").to_dict(), "architectures": ["LlamaForCausalLM"], **changed}
        (tmp_path / "config.json").write_text(json.dumps(config, default=str))
        return tmp_path

    return write


@pytest.mark.parametrize(("changed", "said"), WRONG, ids=[str(case[0]) for case in WRONG])
def test_it_is_refused_by_name(write, changed, said):
    with pytest.raises(CheckpointError) as caught:
        explain(write(changed), sources=ConfigSources(environ={}))
    assert said in caught.value.message
    assert caught.value.remedy


def test_a_wrong_configuration_is_not_blamed_on_the_tokenizer(write, capsys):
    folder = write({"rope_scaling": {"rope_type": "linear"}})
    (folder / "tokenizer_config.json").write_text("{}")
    assert main(["generate", "--model", str(folder), "--prompt", "x", "--json"]) == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["code"] == "checkpoint"
    assert "tokenizer" not in error["message"]
    assert "config.json" in error["message"]
