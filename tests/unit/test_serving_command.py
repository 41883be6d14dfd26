"""The command line of the server: what is refused before a model is loaded."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from inference_shardformer.cli.main import build_parser, main
from inference_shardformer.cli.serve import api_keys
from inference_shardformer.errors import MissingExtraError
from inference_shardformer.serving import extra

SERVE = ["serve", "--model", "demo"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--port", "65536"], "--port 65536: is no port"),
        (["--port", "-1"], "--port -1"),
        (["--port", "x"], "--port"),
        (["--max-queue", "-1"], "--max-queue -1"),
        (["--grace", "21"], "--grace 21: must be 0 to 20 seconds"),
        (["--grace", "nan"], "--grace nan"),
        (["--chat-template", "no/such/file"], "--chat-template no/such/file: cannot be read"),
        (["--api-key-file", "no/such/file"], "--api-key-file no/such/file: cannot be read"),
        (["--api-key", " "], "--api-key: is empty"),
        (["--hots", "x"], "did you mean --host?"),
    ],
)
def test_what_is_wrong_is_one_block_and_exit_code_2(capsys, words, said) -> None:
    assert main([*SERVE, *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert "remedy: " in err


def test_a_file_of_keys(tmp_path, capsys) -> None:
    file = tmp_path / "keys"
    file.write_text(" one \n\ntwo\n")
    args = build_parser().parse_args([*SERVE, "--api-key-file", str(file), "--api-key", "three"])
    assert api_keys(args) == ("three", "one", "two")
    file.write_text("\n \n")
    assert main([*SERVE, "--api-key-file", str(file)]) == 2
    assert "holds no key" in capsys.readouterr().err


def test_a_model_without_tokenizer_is_refused(tmp_path, capsys) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    assert main(["serve", "--model", str(tmp_path)]) == 2
    assert "has no tokenizer" in capsys.readouterr().err


def test_a_missing_library_is_named_with_the_command_that_brings_it(monkeypatch, capsys) -> None:
    monkeypatch.setattr(extra, "LIBRARIES", ("starlette", "no_such_library"))
    with pytest.raises(MissingExtraError, match="not installed: no_such_library") as caught:
        extra.check_libraries()
    assert caught.value.remedy == "pip install 'inference-shardformer[serve]'"
    assert main([*SERVE, "--json"]) == 3
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "missing_extra"


def test_neither_the_command_nor_the_async_engine_needs_the_libraries() -> None:
    script = (
        "import sys\n"
        "from inference_shardformer import AsyncEngine\n"
        "from inference_shardformer.cli.main import main\n"
        "main(['serve', '--model', 'demo', '--port', '-1'])\n"
        "sys.exit(', '.join({'starlette', 'uvicorn', 'prometheus_client'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
