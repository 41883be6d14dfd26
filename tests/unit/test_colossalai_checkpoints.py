"""Checkpoints as ColossalAI writes them: names without "-of-", an index with a size in MB, pickles on request."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import hf_greedy, tiny_config, tiny_model

from inference_shardformer import InferenceConfig, InferenceShardformer, SamplingParams, ShardConfig
from inference_shardformer.errors import CheckpointError

PROMPT = [3, 1, 4, 1, 5]


def write(folder: Path, kind: str, names: tuple[str, str], index: str) -> list[int]:
    """The checkpoint in two files, and what Hugging Face continues the prompt with."""
    model = tiny_model("gqa")
    tiny_config("gqa").save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaForCausalLM"]}))
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    parts = [dict(list(state.items())[i::2]) for i in range(2)]
    for name, part in zip(names, parts, strict=True):
        save_file(part, folder / name) if kind == "safetensors" else torch.save(part, folder / name)
    weights = {key: name for name, part in zip(names, parts, strict=True) for key in part}
    size = sum(tensor.nbytes for tensor in state.values()) / 1024**2
    (folder / index).write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": weights}))
    return hf_greedy(model, PROMPT, 6)


def generate(folder: Path, **weights: object) -> list[int]:
    config = InferenceConfig.model_validate({"dtype": "fp32", "cache": {"num_blocks": 8}, "weights": weights})
    with InferenceShardformer(ShardConfig(device="cpu"), config) as shardformer:
        engine = shardformer.attach(shardformer.from_pretrained(folder))
        return list(engine.generate([PROMPT], SamplingParams(max_new_tokens=6, ignore_eos=True))[0].token_ids)


PICKLED = [
    ("pytorch_model-00001.bin", "pytorch_model-00002.bin"),
    ("pytorch_model-stage-00001-shard-00001.bin", "pytorch_model-stage-00002-shard-00001.bin"),
]


def test_safetensors_files_of_colossalai(tmp_path):
    names = ("model-00001.safetensors", "model-00002.safetensors")
    expected = write(tmp_path, "safetensors", names, "model.safetensors.index.json")
    assert generate(tmp_path) == expected


@pytest.mark.parametrize("names", PICKLED, ids=["shards", "stages"])
def test_pickled_files_of_colossalai_on_request(tmp_path, names):
    expected = write(tmp_path, "pickle", names, "pytorch_model.bin.index.json")
    with pytest.raises(CheckpointError, match=r"inference\.weights\.allow_pickle=true"):
        generate(tmp_path)
    assert generate(tmp_path, allow_pickle=True) == expected


def test_a_single_pickled_file(tmp_path):
    expected = write(tmp_path, "pickle", PICKLED[0], "pytorch_model.bin.index.json")
    state = {}
    for name in PICKLED[0]:
        state |= torch.load(tmp_path / name, weights_only=True)
    for path in tmp_path.glob("pytorch_model*"):
        path.unlink()
    torch.save(state, tmp_path / "pytorch_model.bin")
    assert generate(tmp_path, allow_pickle=True) == expected


def test_safetensors_are_preferred(tmp_path):
    names = ("model-00001.safetensors", "model-00002.safetensors")
    expected = write(tmp_path, "safetensors", names, "model.safetensors.index.json")
    (tmp_path / "pytorch_model.bin").write_bytes(b"not read")
    assert generate(tmp_path, allow_pickle=True) == expected


class Code:
    """What unpickling would run."""

    def __reduce__(self):
        return os.mkdir, (os.environ["COLOSSALAI_TEST_RAN"],)


def test_code_in_a_pickled_file_does_not_run(tmp_path, monkeypatch):
    write(tmp_path, "pickle", PICKLED[0], "pytorch_model.bin.index.json")
    ran = tmp_path / "ran"
    monkeypatch.setenv("COLOSSALAI_TEST_RAN", str(ran))
    torch.save({"model.norm.weight": Code()}, tmp_path / PICKLED[0][1])
    with pytest.raises(CheckpointError, match="cannot be read as plain tensors"):
        generate(tmp_path, allow_pickle=True)
    assert not ran.exists()


@pytest.mark.parametrize(
    ("content", "match"),
    [(b"", "cannot be read"), (b"garbage", "cannot be read"), ({"step": 3}, "more than tensors")],
    ids=["empty", "garbage", "no state dict"],
)
def test_other_files_are_refused(tmp_path, content, match):
    write(tmp_path, "pickle", PICKLED[0], "pytorch_model.bin.index.json")
    path = tmp_path / PICKLED[0][1]
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(CheckpointError, match=match):
        generate(tmp_path, allow_pickle=True)


def test_a_folder_without_weights(tmp_path):
    write(tmp_path, "pickle", PICKLED[0], "pytorch_model.bin.index.json")
    for path in tmp_path.glob("pytorch_model*"):
        path.unlink()
    with pytest.raises(CheckpointError, match="holds neither"):
        generate(tmp_path, allow_pickle=True)
