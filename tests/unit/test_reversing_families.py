"""Every family on two ranks: a checkpoint is saved with its own bytes, a model comes back, weights are exchanged."""

from __future__ import annotations

import pytest
from family_models import FAMILIES, family_model, save_family_model
from reversing import digest, portrait
from safetensors.torch import load_file

from inference_shardformer import ConfigSources
from inference_shardformer.simulation import simulate

KINDS = ("mistral", "qwen2_tied", "qwen3", "phi3", "gemma2", "gemma3", "gpt_neox", "opt", "mixtral", "qwen3_moe")


def weights(folder):
    return digest(load_file(folder / "model.safetensors"))


@pytest.mark.parametrize("case", [case for case in (*KINDS, "baichuan") if case in FAMILIES])
def test_there_and_back(case, tmp_path):
    original, saved, renewed = (tmp_path / name for name in ("original", "saved", "renewed"))
    before = portrait(save_family_model(case, original))
    other = family_model(case, seed=3)
    other.save_pretrained(tmp_path / "other")

    def save(rank):
        with rank.shardformer(sources=ConfigSources(environ={})) as mine:
            model = mine.from_pretrained(original)
            mine.save_pretrained(model, saved)
            mine.attach(model).update_weights(dict(other.state_dict()))
            mine.save_pretrained(model, renewed)

    def return_it(rank):
        model = family_model(case)
        with rank.shardformer(sources=ConfigSources(environ={})) as mine:
            mine.optimize(model)
            mine.unshard(model)
        with rank.shardformer(sources=ConfigSources(environ={})) as mine:
            return portrait(model), portrait(mine.unshard(mine.from_pretrained(original)))

    simulate(2, save)
    assert weights(saved) == weights(original)
    assert weights(renewed) == weights(tmp_path / "other")
    for from_memory, from_files in simulate(2, return_it):
        for part in before:
            assert part == "config" or from_memory[part] == from_files[part] == before[part], part
