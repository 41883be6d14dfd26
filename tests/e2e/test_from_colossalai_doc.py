"""The examples of docs/from-colossalai.md run, and what its tables name exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from tiny_models import hf_greedy, tiny_model
from transformers import AutoTokenizer, GenerationConfig

from inference_shardformer.bridges.colossalai.installing import INSTALL
from inference_shardformer.bridges.colossalai.launching import module_cuda_again

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "from-colossalai.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


class Letters:
    """One token per character."""

    def encode(self, text, **_options):
        return [ord(letter) for letter in text]

    def decode(self, token_ids, **_options):
        return "".join(map(chr, token_ids))


@pytest.fixture
def names(tmp_path):
    """The variables of the examples, which go on from one to the next; the checkpoint is a tiny one."""
    tiny_model("gqa").save_pretrained(tmp_path)
    yield {"PATH": str(tmp_path)}
    module_cuda_again()


def run(example: str, names: dict[str, object]) -> None:
    exec(compile(example.replace('"path/to/llama"', repr(names["PATH"])), "from-colossalai.md", "exec"), names)


@pytest.mark.skipif(torch.cuda.is_available(), reason="compares with a CPU model")
def test_the_script_runs(names, monkeypatch):
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda _path: Letters())
    run(EXAMPLES[0], names)
    prompt = Letters().encode("def fibonacci(n):")
    expected = hf_greedy(tiny_model("gqa"), prompt, 20)
    assert names["token_ids"] == [expected]
    assert names["texts"] == [Letters().decode([*prompt, *expected])]
    names["engine"].close()


@pytest.mark.filterwarnings("ignore")  # of what ColossalAI imports
def test_shardformer_and_a_policy_of_ones_own_run(names):
    expected = hf_greedy(tiny_model("gqa"), [1, 2, 3], 8)
    for example in EXAMPLES[1:]:
        run(example, names)
    assert list(names["output"].token_ids) == expected
    assert list(names["own_output"].token_ids) == expected
    assert type(names["model"].model.layers[0].mlp).__name__ == "LoudMLP"


def test_what_is_named_exists():
    assert INSTALL.replace("peft", "peft==0.13.2") in PAGE
    assert "peft==0.13.2" in (ROOT / "constraints.txt").read_text()
    for name in re.findall(r"\]\((?!http)([^)#]+)\)", PAGE):
        assert (ROOT / "docs" / name).exists(), name
    for name in re.findall(r"`((?:scripts|inference_shardformer)/[\w/.]+)`", PAGE):
        assert (ROOT / name).exists(), name


def test_the_default_length_of_transformers_is_not_taken_for_a_wish():
    from inference_shardformer.bridges.colossalai.requests import sampling_of

    assert sampling_of(GenerationConfig(), 30).max_new_tokens is None
    assert sampling_of(GenerationConfig(max_new_tokens=64), 30).max_new_tokens == 64
