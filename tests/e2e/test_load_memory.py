"""Each rank reads and holds its share of a checkpoint, and little beside it: a draft where weights are compressed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from tiny_models import save_tiny_model
from transformers import LlamaConfig, LlamaForCausalLM

SHAPE = {
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}  # 160 M parameters, 320 MB in bf16


@pytest.mark.parametrize(("compression", "least"), [("none", 1.0), ("auto", 0.75)])
def test_each_rank_reads_and_holds_its_share(tmp_path: Path, compression: str, least: float) -> None:
    save_tiny_model("gqa", tmp_path / "small")
    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "large", max_shard_size="100MB")
    whole = sum(parameter.nbytes for parameter in model.parameters())
    replicated = sum(parameter.nbytes for name, parameter in model.named_parameters() if "norm" in name)
    del model
    arguments = [str(tmp_path / "small"), str(tmp_path / "large"), str(tmp_path), compression]
    for rank in run_ranks("load_ranks.py", *arguments, nproc=2, timeout_s=200):
        assert rank.returncode == 0, rank.stderr[-4000:]
    share = (whole - replicated) // 2 + replicated
    for rank in (0, 1):
        report = json.loads((tmp_path / f"{rank}.json").read_text())
        assert report["planned"] == report["held"]
        assert report["read"] == share
        assert least * share <= report["planned"] <= 1.01 * share  # what a kernel pads
        assert report["peak"] <= 1.1 * report["planned"]
