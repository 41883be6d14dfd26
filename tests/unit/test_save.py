"""Saving: a gathered checkpoint has the original bytes, per-rank files load on the same ranks and on no others."""

from __future__ import annotations

import json

import pytest
import torch
from reversing import digest, raw
from safetensors.torch import load_file
from tiny_models import hf_greedy, save_tiny_model, tiny_model
from transformers import AutoModelForCausalLM, GenerationConfig

from inference_shardformer import ConfigSources, InferenceConfig, InferenceShardformer
from inference_shardformer.errors import CheckpointError, PlanFileError, StateError
from inference_shardformer.sharding.safetensors_writer import SafetensorsWriter
from inference_shardformer.sharding.save import max_bytes
from inference_shardformer.simulation import simulate

CASES = ["gqa", "biased", "gqa_fewer_kv_heads_than_ranks", "odd_vocabulary", "odd_vocabulary_tied"]
PROMPT = [3, 14, 15, 9, 2]
CPU = ConfigSources(environ={})


def shardformer(rank=None, **inference) -> InferenceShardformer:
    make = InferenceShardformer if rank is None else rank.shardformer
    return make(None, InferenceConfig(**inference), sources=CPU)


def tensors_of(folder) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, by the format's own library."""
    return {name: tensor for file in folder.glob("model*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("case", CASES)
def test_gathered_from_a_checkpoint(case, tp_size, tmp_path):
    original, folder = tmp_path / "original", tmp_path / "saved"
    save_tiny_model(case, original)
    expected = hf_greedy(AutoModelForCausalLM.from_pretrained(original), PROMPT, 6)

    def program(rank):
        with shardformer(rank) as mine:
            model = mine.from_pretrained(original)
            mine.save_pretrained(model, folder, max_shard_size="20KB")

    simulate(tp_size, program)
    assert digest(tensors_of(folder)) == digest(tensors_of(original))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(tensors_of(original))
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors_of(original).values())
    assert not list(folder.glob("*.partial"))
    loaded, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert hf_greedy(loaded, PROMPT, 6) == expected
    saved, given = (json.loads((path / "config.json").read_text()) for path in (folder, original))
    assert saved == given


def test_gathered_from_memory_with_its_generation_config(tmp_path):
    model = tiny_model("tied").bfloat16()
    model.generation_config = GenerationConfig(eos_token_id=[5, 7], pad_token_id=0)
    before = {name: raw(tensor) for name, tensor in model.state_dict().items()}
    with shardformer(dtype="fp32") as mine:
        sharded, _ = mine.optimize(model)
        mine.save_pretrained(sharded, tmp_path)
    written = tensors_of(tmp_path)
    assert "lm_head.weight" not in written
    assert {name: raw(tensor) for name, tensor in written.items()} == {name: before[name] for name in written}
    assert not (tmp_path / "model.safetensors.index.json").exists()
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == "bfloat16"
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == [5, 7]


@pytest.mark.parametrize("tp_size", [1, 2])
def test_bf16_as_it_is(tp_size, tmp_path):
    tiny_model("tied").bfloat16().save_pretrained(tmp_path / "original")

    def program(rank):
        with shardformer(rank) as mine:
            mine.save_pretrained(mine.from_pretrained(tmp_path / "original"), tmp_path / "saved")
            return mine.sharded.model.dtype

    assert simulate(tp_size, program) == [torch.bfloat16] * tp_size
    assert digest(tensors_of(tmp_path / "saved")) == digest(tensors_of(tmp_path / "original"))


def test_quantised_weights_are_not_saved_and_do_not_come_back(tmp_path):
    with shardformer(weights={"quantization": "int8"}) as mine:
        model, _ = mine.optimize(tiny_model("gqa"))
        for save in (mine.save_pretrained, mine.save_sharded):
            with pytest.raises(CheckpointError, match="quantised weights are not saved"):
                save(model, tmp_path)
        with pytest.raises(StateError, match="quantised weights cannot become"):
            mine.unshard(model)
        engine = mine.attach(model)
        engine.update_weights(tiny_model("gqa", seed=7).state_dict())
        assert engine.generate([PROMPT])[0].finish_reason == "length"


def test_a_narrower_type_is_written_as_it_was_computed(tmp_path):
    with shardformer(dtype="bf16") as mine:
        sharded, _ = mine.optimize(tiny_model("gqa"))
        mine.save_pretrained(sharded, tmp_path)
    expected = {name: tensor.bfloat16() for name, tensor in tiny_model("gqa").state_dict().items()}
    assert digest(tensors_of(tmp_path)) == digest(expected)


def test_the_generation_config_of_a_checkpoint_comes_along(tmp_path):
    original, folder = tmp_path / "original", tmp_path / "saved"
    save_tiny_model("gqa", original)
    GenerationConfig(eos_token_id=[5, 7]).save_pretrained(original)
    with shardformer() as mine:
        mine.save_pretrained(mine.from_pretrained(original), folder)
    assert GenerationConfig.from_pretrained(folder).eos_token_id == [5, 7]


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("case", ["gqa_fewer_kv_heads_than_ranks", "odd_vocabulary_tied"])
def test_each_rank_its_own_file(case, tp_size, tmp_path):
    original, parts, again = tmp_path / "original", tmp_path / "parts", tmp_path / "again"
    save_tiny_model(case, original)

    def save(rank):
        with shardformer(rank) as mine:
            mine.save_sharded(mine.from_pretrained(original), parts)

    def load(rank):
        with shardformer(rank) as mine:
            mine.save_pretrained(mine.load_sharded(parts), again)
            return mine.sharded.bytes_read, mine.sharded.rank_bytes[rank.tp_rank]

    simulate(tp_size, save)
    files = sorted(path.name for path in parts.glob("rank-*"))
    assert files == [f"rank-{rank:05d}-of-{tp_size:05d}.safetensors" for rank in range(tp_size)]
    for read, held in simulate(tp_size, load):
        assert read <= held  # padding is not read
    assert digest(tensors_of(again)) == digest(tensors_of(original))


def test_files_of_other_ranks_or_plans_are_refused(tmp_path):
    original, parts, other = tmp_path / "original", tmp_path / "parts", tmp_path / "other"
    save_tiny_model("gqa", original)

    def save(rank, folder=parts, source=original):
        with shardformer(rank) as mine:
            mine.save_sharded(mine.from_pretrained(source), folder)

    def load(rank):
        with shardformer(rank) as mine:
            mine.load_sharded(parts)

    simulate(2, save)
    with pytest.raises(PlanFileError, match=r"was saved by 2 rank\(s\), and is loaded on 4"):
        simulate(4, load)
    save_tiny_model("mha", tmp_path / "mha")
    simulate(2, lambda rank: save(rank, other, tmp_path / "mha"))
    name = "rank-00001-of-00002.safetensors"
    (parts / name).write_bytes((other / name).read_bytes())
    with pytest.raises(CheckpointError, match=r"rank 1: .*does not belong to plan.json beside it"):
        simulate(2, load)
    (parts / "config.json").write_text((other / "config.json").read_text())
    with pytest.raises(PlanFileError, match="was made for another model"):
        simulate(2, load)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with shardformer() as mine:
        sharded, _ = mine.optimize(tiny_model("gqa"))
        with pytest.raises(CheckpointError, match="cannot be made"):
            mine.save_pretrained(sharded, tmp_path / "file")
        with pytest.raises(CheckpointError, match="is no size"):
            mine.save_pretrained(sharded, tmp_path / "x", max_shard_size="many")
        with pytest.raises(StateError, match="another LlamaForCausalLM"):
            mine.save_sharded(tiny_model("gqa"), tmp_path / "x")


def test_a_disk_that_is_full_leaves_no_file(tmp_path):
    kinds = {"a": ((2, 3), torch.float32), "b": ((4,), torch.bfloat16)}

    class FullDisk:
        def write(self, data):
            raise OSError(28, "No space left on device")

        def close(self):
            pass

    writer = SafetensorsWriter(tmp_path / "x.safetensors", kinds)
    writer._file.close()
    writer._file = FullDisk()
    writer.write("a", torch.zeros(2, 3))
    writer.write("b", torch.zeros(4))
    with pytest.raises(CheckpointError, match="No space left"):
        writer.close()
    assert list(tmp_path.iterdir()) == []
    with (
        pytest.raises(CheckpointError, match="b was never written"),
        SafetensorsWriter(tmp_path / "y", kinds) as writer,
    ):
        writer.write("a", torch.zeros(2, 3))
    with (
        pytest.raises(CheckpointError, match="b does not come next"),
        SafetensorsWriter(tmp_path / "z", kinds) as writer,
    ):
        writer.write("b", torch.zeros(4))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("size", "expected"), [(7, 7), ("5GB", 5 * 10**9), ("1.5 MiB", 3 * 2**19), ("20kb", 20_000)])
def test_sizes(size, expected):
    assert max_bytes(size) == expected


@pytest.mark.parametrize("size", [0, "GB", "-1GB", "5", "5 TB"])
def test_what_is_no_size(size):
    with pytest.raises(CheckpointError, match="is no size"):
        max_bytes(size)
