"""What the README shows exists and works."""

from __future__ import annotations

import re
from argparse import _SubParsersAction
from pathlib import Path

from tiny_models import save_tiny_model
from transformers import AutoTokenizer

from inference_shardformer.cli.main import build_parser

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def _options(parser) -> set[str]:
    """Every long option of a parser and of its sub-commands."""
    found = {option for action in parser._actions for option in action.option_strings if option.startswith("--")}
    for action in parser._actions:
        if isinstance(action, _SubParsersAction):
            found |= {option for child in action.choices.values() for option in _options(child)}
    return found


def test_the_table_of_options_is_complete():
    foreign = {"--nproc-per-node", "--help", "--version"}
    assert set(re.findall(r"--[a-z][a-z-]+", README)) | foreign == _options(build_parser()) | foreign


def test_the_python_example_runs(tmp_path, monkeypatch, capsys):
    save_tiny_model("gqa", tmp_path)
    example = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    for name, value in (('"path/to/llama"', repr(str(tmp_path))), ("tp_size=2", "tp_size=1")):
        assert name in example
        example = example.replace(name, value)

    class Letters:
        def encode(self, text):
            return [ord(letter) for letter in text]

        def decode(self, token_ids, **_options):
            return "".join(map(chr, token_ids))

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda _path: Letters())
    exec(compile(example, "README.md", "exec"), {})
    out = capsys.readouterr().out
    assert "inference.attention" in out


def test_linked_and_named_files_exist():
    root = Path(__file__).parents[2]
    for name in [*re.findall(r"\]\((?!http)([^)]+)\)", README), *re.findall(r"(?:scripts|tests)/[\w/.]+\.\w+", README)]:
        assert (root / name).exists(), name
