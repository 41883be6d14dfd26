"""The command line up to the model: exit codes, error blocks, error objects, and nothing heavy imported."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from inference_shardformer.cli import generate as generate_command
from inference_shardformer.cli.main import main
from inference_shardformer.cli.ranks import note_reported
from inference_shardformer.errors import (
    BackendUnavailableError,
    EnvironmentMismatchError,
    InferenceShardformerError,
    RankFailure,
    RequestError,
)

LAUNCHED = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch):
    for name in [*LAUNCHED, *(name for name in os.environ if name.startswith("INFERENCE_SHARDFORMER_"))]:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def checkpoint(tmp_path):
    """A folder that passes for a checkpoint as long as nobody reads weights."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64, "intermediate_size": 128}
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "float32", **heads}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    return str(folder)


GENERATE = ["generate", "--model", "MODEL", "--prompt", "x"]


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ([], "usage", "COMMAND"),
        (["genrate"], "usage", "invalid choice: 'genrate'"),
        (["generate", "--prompt", "x"], "usage", "required: --model"),
        (["bench"], "usage", "required: KIND"),
        (["bench", "throughput", "--model", "MODEL"], "usage", "required: --workload"),
        ([*GENERATE, "--promt", "y"], "usage", "did you mean --prompt?"),
        (["generat", "--model", "x"], "usage", "did you mean generate?"),
        (["bench", "throughputs"], "usage", "did you mean throughput?"),
        ([*GENERATE, "--stop", "--"], "usage", "--stop=-VALUE"),
        ([*GENERATE, "--max-new", "3"], "usage", "unrecognized arguments: --max-new"),
        (["generate", "--model", "MODEL"], "usage", "no prompt given"),
        ([*GENERATE, "--prompts-file", "none.jsonl"], "usage", "none.jsonl: cannot be read"),
        ([*GENERATE, "--config", "none.yaml"], "config", "none.yaml: cannot be read"),
        ([*GENERATE, "--tp", "0"], "config", "shard.tp_size = 0"),
        ([*GENERATE, "--temperature", "nan"], "config", "inference.sampling.temperature = nan"),
        ([*GENERATE, "--top-p", "1.5", "--top-k", "-1"], "config", "2 configuration values were refused"),
        ([*GENERATE, "--set", "cache.blok_size=3"], "config", "did you mean inference.cache.block_size?"),
        ([*GENERATE, "--stop", ""], "request", "none of them empty"),
        ([*GENERATE, "--tp", "3"], "tp_size", "use one of 1, 2, 4"),
        (["generate", "--model", "./missing", "--prompt", "x"], "checkpoint", "./missing: no such folder"),
        (["generate", "--model", "a/b/c", "--prompt", "x"], "checkpoint", "a/b/c: no such folder"),
        (["generate", "--model", __file__, "--prompt", "x"], "checkpoint", "is a file, not a checkpoint folder"),
        (["generate", "--model", os.path.dirname(__file__), "--prompt", "x"], "checkpoint", "holds no config.json"),
        (["bench", "throughput", "--model", "MODEL", "--workload", "w", "--repeat", "0"], "usage", "--repeat 0"),
    ],
)
def test_bad_input_is_one_block_and_exit_code_2(checkpoint, capsys, words, code, said):
    words = [checkpoint if word == "MODEL" else word for word in words]
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert said in err
    assert "remedy: " in err
    assert "Traceback" not in err

    assert main([*words, "--json"]) == 2
    out, again = capsys.readouterr()
    assert again == err
    (record,) = map(json.loads, out.splitlines())
    assert record["error"].keys() == {"code", "message", "remedy"}
    assert record["error"]["code"] == code
    assert record["error"]["remedy"]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RequestError("no", remedy="r"), 2),
        (BackendUnavailableError("no", remedy="r"), 3),
        (EnvironmentMismatchError("no", remedy="r"), 3),
        (RankFailure(rank=1, phase="decode", cause="boom", remedy="r"), 4),
        (InferenceShardformerError("no", remedy="r"), 1),
        (ZeroDivisionError("division"), 1),
        (KeyboardInterrupt(), 130),
        (BrokenPipeError(), 1),
    ],
)
def test_exit_codes(checkpoint, capfd, monkeypatch, error, code):
    def explode(*_args, **_kwargs):
        raise error

    monkeypatch.setattr(generate_command, "open_session", explode)
    assert main(["generate", "--model", checkpoint, "--prompt", "x"]) == code
    err = capfd.readouterr().err
    assert "Traceback" not in err
    if isinstance(error, ZeroDivisionError):
        assert "unexpected ZeroDivisionError: division" in err
        assert main(["generate", "--model", checkpoint, "--prompt", "x", "--debug"]) == code
        assert "Traceback" in capfd.readouterr().err
    if isinstance(error, KeyboardInterrupt):
        assert err == "interrupted\n"
    if isinstance(error, BrokenPipeError):
        assert err == ""


def test_ranks_other_than_the_main_one_report_what_only_they_know(checkpoint, capsys, monkeypatch):
    pauses = []
    monkeypatch.setattr("time.sleep", pauses.append)
    for name, value in (LAUNCHED | {"RANK": "1", "WORLD_SIZE": "2"}).items():
        monkeypatch.setenv(name, value)
    assert main(["generate", "--model", checkpoint, "--json"]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: rank 1: no prompt given")
    assert json.loads(out)["error"]["message"].startswith("rank 1: no prompt given")
    assert pauses == [3.0]  # in which the launcher ends this rank if the main one had the same error

    def explode(*_args, **_kwargs):
        raise RankFailure(rank=1, phase="decode", cause="boom")

    monkeypatch.setattr(generate_command, "open_session", explode)
    assert main(["generate", "--model", checkpoint, "--prompt", "x", "--json"]) == 4
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("RANK", "0")
    assert main(["generate", "--model", checkpoint]) == 2
    assert capsys.readouterr().err.startswith("error: no prompt given")
    assert pauses == [3.0]


def test_tp_outside_of_torchrun_launches_the_same_words(checkpoint, capsys, monkeypatch):
    launched = []
    launcher = SimpleNamespace(launch_ranks=lambda words, nproc: launched.append((words, nproc)) or codes.pop())
    monkeypatch.setitem(sys.modules, "inference_shardformer.distributed.launch", launcher)
    codes = [143, 130, 4, 0]
    words = ["generate", "--model", checkpoint, "--prompt", "x", "--set", "tp_size=2"]
    assert main(words) == 0
    assert launched == [(words, 2)]
    assert capsys.readouterr() == ("", "")
    assert main([*words, "--json"]) == 4
    out, err = capsys.readouterr()
    assert "ended without a report (exit code 4)" in err
    assert json.loads(out)["error"]["code"] == "rank_failure"
    assert main(words) == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert main(words) == 4
    assert "the 2 ranks were told to end (SIGTERM)" in capsys.readouterr().err


@pytest.mark.parametrize("said", [0, 4])
def test_after_sigterm_the_code_is_what_the_main_rank_ended_with(checkpoint, capsys, monkeypatch, said):
    def launch_ranks(words, nproc):
        note_reported(said)
        return 128 + signal.SIGTERM

    module = SimpleNamespace(launch_ranks=launch_ranks)
    monkeypatch.setitem(sys.modules, "inference_shardformer.distributed.launch", module)
    assert main(["generate", "--model", checkpoint, "--prompt", "x", "--tp", "2"]) == said
    assert capsys.readouterr() == ("", "")
    module.launch_ranks = lambda words, nproc: 128 + signal.SIGTERM
    assert main(["generate", "--model", checkpoint, "--prompt", "x", "--tp", "2"]) == 4
    assert "the 2 ranks were told to end (SIGTERM)" in capsys.readouterr().err


def test_a_report_of_the_main_rank_is_not_repeated(checkpoint, capsys, monkeypatch):
    def launch_ranks(words, nproc):
        for name, value in LAUNCHED.items():
            monkeypatch.setenv(name, value)
        return main(words)

    def explode(*_args, **_kwargs):
        raise RankFailure(rank=1, phase="decode", cause="boom")

    monkeypatch.setattr(generate_command, "open_session", explode)
    module = SimpleNamespace(launch_ranks=launch_ranks)
    monkeypatch.setitem(sys.modules, "inference_shardformer.distributed.launch", module)
    assert main(["generate", "--model", checkpoint, "--prompt", "x", "--tp", "2"]) == 4
    assert capsys.readouterr().err.count("error:") == 1

    def break_pipe(*_args, **_kwargs):
        raise BrokenPipeError

    for name in LAUNCHED:
        monkeypatch.delenv(name)
    monkeypatch.setattr(generate_command, "open_session", break_pipe)
    with capsys.disabled(), open(os.devnull, "w") as nowhere, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", nowhere)
        assert main(["generate", "--model", checkpoint, "--prompt", "x", "--tp", "2"]) == 1
    assert capsys.readouterr() == ("", "")

    # some of the requests were refused, which the main rank has shown in their places
    monkeypatch.setattr(
        generate_command, "open_session", lambda *_args, **_kwargs: nullcontext(SimpleNamespace(engine=0))
    )
    monkeypatch.setattr(generate_command, "write_text", lambda *_args: 2)
    for name in LAUNCHED:
        monkeypatch.delenv(name)
    assert main(["generate", "--model", checkpoint, "--prompt", "x", "--tp", "2"]) == 2
    assert capsys.readouterr() == ("", "")


def test_an_unsupported_architecture_is_refused_before_ranks_start(checkpoint, tmp_path, capsys):
    (tmp_path / "checkpoint" / "config.json").write_text('{"architectures": ["MambaForCausalLM"]}')
    assert main(["generate", "--model", checkpoint, "--prompt", "x", "--tp", "2"]) == 2
    assert "LlamaForCausalLM" in capsys.readouterr().err


def test_a_text_prompt_needs_a_tokenizer(checkpoint, tmp_path, capsys):
    (tmp_path / "checkpoint" / "tokenizer.json").unlink()
    assert main(["generate", "--model", checkpoint, "--prompt", "x"]) == 2
    assert "has no tokenizer, and a prompt is text" in capsys.readouterr().err


def test_help_version_and_usage_errors_import_nothing_heavy():
    script = (
        "import sys\n"
        "from inference_shardformer.cli.main import main\n"
        "codes = [main(['--version']), main(['generate', '--help']), main(['generate', '--tp', '2'])]\n"
        "heavy = {'torch', 'transformers', 'triton', 'numpy', 'rich'} & set(sys.modules)\n"
        "sys.exit(f'{codes} {heavy}' if heavy or codes != [0, 0, 2] else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "inference-shardformer 0.1.0" in done.stdout
    assert "--prompts-file" in done.stdout
