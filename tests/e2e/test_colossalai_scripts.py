"""ColossalAI's README example runs on CPU ranks with its import lines changed, and answers what the model says."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import inference_shardformer

DEMO = Path(inference_shardformer.__file__).parent / "demo_model"
PROMPT = "Who is the best player in the history of NBA?"
NUM_TOKENS = 512  # max_output_len of the script


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> tuple[Path, str]:
    """A tiny model with a tokenizer and the context that the script asks for, and its answer by Hugging Face."""
    folder = tmp_path_factory.mktemp("vicuna")
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        eos_token_id=None,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config).half().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.copy_(torch.randn_like(parameter) * 0.2)
    ids = torch.tensor([tokenizer.encode(PROMPT)])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, pad_token_id=0)
    # the ninth token ends it, so that 512 are not waited for
    model.generation_config.eos_token_id = int(out[0, -1])
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, folder / name)
    return folder, tokenizer.decode(out[0], skip_special_tokens=True)


@pytest.mark.parametrize("tp_size", [1, 2])
def test_the_example_of_the_readme(checkpoint, tp_size):
    folder, answer = checkpoint
    for rank in run_ranks("colossalai_scripts.py", str(folder), nproc=tp_size):
        assert rank.returncode == 0, rank.stderr[-4000:]
        assert rank.lines == [[answer], [answer]]
        assert "torch has no CUDA device here" in rank.stderr or torch.cuda.is_available()
