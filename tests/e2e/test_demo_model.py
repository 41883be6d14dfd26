"""The shipped demo model: a real trained checkpoint that continues Python, the same through the engine."""

from __future__ import annotations

import inspect
import textwrap
from pathlib import Path

import pytest
import torch
from tiny_models import hf_greedy
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from inference_shardformer import InferenceConfig, InferenceShardformer, SamplingParams, ShardConfig
from inference_shardformer.cli.models import resolve_model

PROMPTS = ["def ", "def fibonacci(n):\n", "for i in ", "class Foo(object):\n    def __init__(self", "import os\n"]
CPU = ShardConfig(device="cpu")


@pytest.fixture(scope="module")
def folder() -> Path:
    return Path(resolve_model("demo"))


@pytest.fixture(scope="module")
def reference(folder: Path) -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(folder).float().eval()


def test_the_folder_is_small_and_complete(folder: Path) -> None:
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md", "generation_config.json"} <= names
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 10_000_000


def test_the_tokenizer_keeps_any_text(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "def f(x):\n\treturn {'ä€𝄞': x}  # ünï\r\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_python_is_far_likelier_than_the_same_words_shuffled(folder: Path, reference: LlamaForCausalLM) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([tokenizer.encode(inspect.getsource(textwrap.dedent))])
    shuffled = ids[:, torch.randperm(ids.shape[1], generator=torch.Generator().manual_seed(0))]
    with torch.inference_mode():
        loss, loss_shuffled = (reference(rows, labels=rows).loss.item() for rows in (ids, shuffled))
    assert loss < 3.0  # a uniform guess is 7.6
    assert loss_shuffled > 2 * loss


def test_engine_tokens_equal_hugging_face(folder: Path, reference: LlamaForCausalLM) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with InferenceShardformer(CPU, InferenceConfig(dtype="fp32")) as shardformer:
        engine = shardformer.attach(shardformer.from_pretrained(folder), tokenizer=tokenizer)
        outputs = engine.generate(PROMPTS, SamplingParams(max_new_tokens=32))
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        expected = hf_greedy(reference, tokenizer.encode(prompt), 32)
        assert list(output.token_ids) == expected
        assert output.text == tokenizer.decode(expected, skip_special_tokens=True)
