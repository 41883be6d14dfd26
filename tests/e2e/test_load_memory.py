"""Each rank reads and holds its share of a checkpoint, and no more than a tenth beside it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch
from tiny_models import save_tiny_model
from transformers import LlamaConfig, LlamaForCausalLM

SUPPORT = Path(__file__).parents[1] / "support"

SHAPE = {
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}  # 160 M parameters, 320 MB in bf16


def test_each_rank_reads_and_holds_its_share(tmp_path: Path) -> None:
    save_tiny_model("gqa", tmp_path / "small")
    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "large", max_shard_size="100MB")
    whole = sum(parameter.nbytes for parameter in model.parameters())
    replicated = sum(parameter.nbytes for name, parameter in model.named_parameters() if "norm" in name)
    del model
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    folders = [str(tmp_path / "small"), str(tmp_path / "large"), str(tmp_path)]
    done = subprocess.run(
        [*command, str(SUPPORT / "load_ranks.py"), *folders], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    share = (whole - replicated) // 2 + replicated
    for rank in (0, 1):
        report = json.loads((tmp_path / f"{rank}.json").read_text())
        assert report["planned"] == report["held"] == report["read"] == share
        assert report["peak"] <= 1.1 * share
