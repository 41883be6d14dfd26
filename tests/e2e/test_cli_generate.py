"""The command line as a user runs it: real processes and ranks, tokens equal to Hugging Face's, and what goes wrong."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
from tiny_models import hf_greedy, save_tiny_model
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from inference_shardformer.cli.main import main

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "inference_shardformer.cli.main"]
TEXTS = ["def f(x):", "a"]
IDS = [3, 1, 159, 0, 42]


class Checkpoint(NamedTuple):
    """A tiny LLaMA with a tokenizer of one token per letter, and what Hugging Face continues its prompts with."""

    folder: Path
    prompts: list[list[int]]  # TEXTS as ids, then IDS
    expected: list[list[int]]  # 12 tokens for each text, 3 for IDS
    texts: list[str]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("cli") / "tiny"
    model = save_tiny_model("gqa", folder)
    letters = {chr(i): i for i in range(128)} | {f"<{i}>": i for i in range(128, 160)}
    plain = Tokenizer(models.BPE(vocab=letters, merges=[], unk_token="<159>"))
    plain.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<159>")
    tokenizer.save_pretrained(folder)
    prompts = [*map(tokenizer.encode, TEXTS), IDS]
    expected = [hf_greedy(model, prompt, length) for prompt, length in zip(prompts, (12, 12, 3), strict=True)]
    # unknown and special tokens are not part of a text
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in expected]
    return Checkpoint(folder, prompts, expected, texts)


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def run(*words: object, command: list[str] | None = None, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    words = [*(command or COMMAND), *map(str, words)]
    return subprocess.run(words, capture_output=True, text=True, timeout=120, check=False, cwd=cwd)


def prompt_options(checkpoint: Checkpoint, *more: dict) -> list[str]:
    """Options for the texts, and a file with the ids and with `more`."""
    lines = [{"prompt_token_ids": IDS, "max_new_tokens": 3}, *more]
    file = checkpoint.folder.parent / f"prompts-{len(lines)}.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    texts = [word for text in TEXTS for word in ("--prompt", text)]
    return ["--model", str(checkpoint.folder), *texts, "--prompts-file", str(file), "--max-new-tokens", "12"]


def served(checkpoint: Checkpoint) -> list[dict]:
    """What `--json` must print for the good prompts."""
    rows = zip(checkpoint.prompts, checkpoint.expected, checkpoint.texts, strict=True)
    return [
        {"index": i, "prompt_token_ids": prompt, "token_ids": ids, "text": text, "finish_reason": "length"}
        for i, (prompt, ids, text) in enumerate(rows)
    ]


def test_two_ranks_give_the_tokens_of_hugging_face(checkpoint):
    done = run("generate", *prompt_options(checkpoint), "--tp", 2, "--json", "--set", "cache.block_size=4")
    assert done.returncode == 0, done.stderr
    assert [json.loads(line) for line in done.stdout.splitlines()] == served(checkpoint)
    for words in ("tp_size    2 (option --tp)", "attention  ", "dtype      fp32", "tokens/s", "loaded     "):
        assert done.stderr.count(words) == 1, done.stderr


def test_log_probabilities_are_printed_where_they_are_asked_for(checkpoint, capsys):
    words = ["generate", "--model", str(checkpoint.folder), "--prompt", "a", "--max-new-tokens", "3"]
    assert main([*words, "--json", "--logprobs", "2"]) == 0
    [record] = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [each["token_id"] for each in record["logprobs"]] == record["token_ids"] == checkpoint.expected[1][:3]
    for each in record["logprobs"]:
        assert each["rank"] == 1
        assert each["top"][0] == {name: each[name] for name in ("token_id", "logprob", "rank")}
        assert [likely["rank"] for likely in each["top"]] == [1, 2]
    assert main([*words, "--logprobs", "2"]) == 2
    assert "add --json" in capsys.readouterr().err
    assert main([*words, "--json", "--logprobs", "200"]) == 2
    assert "below 129" in capsys.readouterr().err


def test_refused_requests_leave_the_others_alone(checkpoint):
    bad = [{"prompt_token_ids": [160]}, {"prompt_token_ids": [1] * 300}]
    options = [*prompt_options(checkpoint, *bad), "--prompt", ""]
    done = run("generate", *options, "--json", "--attention-backend", "reference")
    assert done.returncode == 2, done.stderr
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert [record["index"] for record in records] == list(range(6))
    good = [record for record in records if "error" not in record]
    assert [record["token_ids"] for record in good] == checkpoint.expected
    assert [record["index"] for record in good] == [0, 1, 3]
    messages = [record["error"]["message"] for record in records if "error" in record]
    assert "empty" in messages[0]
    assert "160" in messages[1]
    assert "256" in messages[2]
    assert "Traceback" not in done.stderr
    assert "attention  reference (option --attention-backend)" in done.stderr


def test_plain_text_under_torchrun(checkpoint, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    options = prompt_options(checkpoint)
    done = run(*options, command=[*torchrun, str(ROOT / "scripts" / "generate.py")], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "".join(f"{text}\n" for text in checkpoint.texts)
    assert "tp_size    2 (" in done.stderr


def test_throughput_on_two_ranks(checkpoint):
    workload = checkpoint.folder.parent / "workload.json"
    requests = [{"prompt": [5, 6, 7], "max_new": 4}, {"prompt": [1], "max_new": 9}, {"prompt": [2, 3], "max_new": 6}]
    workload.write_text(json.dumps({"max_running": 2, "requests": requests}))
    options = ["--model", checkpoint.folder, "--workload", workload, "--dtype", "bf16", "--repeat", 2, "--tp", 2]
    done = run("bench", "throughput", *options, "--json")
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) == 2
    for result in results:
        assert (result["generated_tokens"], result["prompt_tokens"]) == (19, 6)
        assert 0 < result["time_to_first_token_s"] < result["seconds"]
        assert result["generated_tokens_per_second"] == pytest.approx(19 / result["seconds"])
        assert 10**8 < result["peak_rss_bytes"] < 10**10


def test_interrupt_ends_all_ranks_with_130(checkpoint, tmp_path):
    file = tmp_path / "many.jsonl"
    file.write_text('{"prompt_token_ids": [1, 2, 3], "max_new_tokens": 250}\n' * 3000)
    words = ["generate", "--model", str(checkpoint.folder), "--prompts-file", str(file), "--tp", "2", "--json"]
    with subprocess.Popen(
        [*COMMAND, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path
    ) as process:
        said = ""
        while "attention" not in said:
            line = process.stderr.readline()
            assert line, said
            said += line
        time.sleep(0.5)
        ranks = psutil.Process(process.pid).children(recursive=True)
        assert len(ranks) >= 2
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130, said + err
    assert err == "interrupted\n"
    assert out == ""
    _, alive = psutil.wait_procs(ranks, timeout=30)
    assert not alive


def test_a_reader_that_goes_away_is_no_failure_of_a_rank(checkpoint):
    words = ["generate", *prompt_options(checkpoint), "--tp", "2", "--json"]
    with subprocess.Popen([*COMMAND, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        err = process.stderr.read()
    assert process.returncode == 1
    assert "tokens/s" not in err
    assert "error" not in err
    assert "Traceback" not in err


def test_a_file_that_one_rank_lacks_is_named_by_that_rank(checkpoint, tmp_path):
    """Only that rank can: the others wait for it in vain, and then the launcher ends them."""
    program = tmp_path / "program.py"
    program.write_text(
        "import os\nfrom pathlib import Path\nfrom inference_shardformer.cli.main import run_as_program\n"
        "model = str(Path(os.environ['MODEL'], 'none') if os.environ['RANK'] == '1' else os.environ['MODEL'])\n"
        "run_as_program(['generate', '--prompt', 'x', '--json', '--model', model])\n"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(program)]
    done = subprocess.run(
        torchrun,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "MODEL": str(checkpoint.folder)},
    )
    assert json.loads(done.stdout)["error"]["code"] == "checkpoint"
    assert done.stderr.count("error: rank 1: --model ") == 1
    assert "no such folder" in done.stderr


def test_a_world_of_another_size_is_refused(checkpoint):
    launched = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    words = ["generate", "--model", str(checkpoint.folder), "--prompt", "x", "--tp", "2", "--json"]
    done = subprocess.run(
        [*COMMAND, *words], capture_output=True, text=True, timeout=60, check=False, env={**os.environ, **launched}
    )
    assert done.returncode == 3, done.stderr
    assert json.loads(done.stdout)["error"]["code"] == "environment"
    assert "tp_size=2" in done.stderr


def _truncate(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def _corrupt(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(b"\xff" * 8 + weights.read_bytes()[8:])


def _edit(**changes):
    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))

    return edit


@pytest.mark.parametrize(
    ("damage", "options", "exit_code", "code", "words"),
    [
        (_truncate, [], 2, "checkpoint", "model.safetensors"),
        (_corrupt, [], 2, "checkpoint", "model.safetensors"),
        (lambda folder: (folder / "model.safetensors").unlink(), [], 2, "checkpoint", "model.safetensors"),
        (lambda folder: (folder / "config.json").write_text("{"), [], 2, "checkpoint", "config.json"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), [], 2, "checkpoint", "tokenizer"),
        (lambda folder: (folder / "tokenizer_config.json").write_text("5"), [], 2, "checkpoint", "tokenizer"),
        (_edit(num_attention_heads="eight"), [], 2, "checkpoint", "num_attention_heads"),
        (_edit(num_attention_heads=0), [], 2, "checkpoint", "zero"),
        (_edit(num_hidden_layers=3), [], 2, "checkpoint", "layers.2"),
        (_edit(num_hidden_layers=1), [], 2, "checkpoint", "layers.1"),
        (_edit(architectures=["GPT2LMHeadModel"]), [], 2, "unsupported_model", "LlamaForCausalLM"),
        (None, ["--attention-backend", "sdpaa"], 3, "backend", "sdpa"),
        (None, ["--set", "max_model_len=100000"], 2, "config", "100000"),
        (None, ["--device", "cuda"], 3, "environment", "cuda"),
    ],
)
def test_a_bad_checkpoint_or_choice_is_one_clear_error(
    checkpoint, tmp_path, capsys, monkeypatch, damage, options, exit_code, code, words
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    folder = checkpoint.folder
    if damage is not None:
        folder = Path(shutil.copytree(folder, tmp_path / "damaged"))
        damage(folder)
    assert main(["generate", "--model", str(folder), "--prompt", "x", "--json", *options]) == exit_code
    out, err = capsys.readouterr()
    (record,) = map(json.loads, out.splitlines())
    assert record["error"]["code"] == code, record
    assert words in record["error"]["message"] + record["error"]["remedy"]
    assert record["error"]["remedy"]
    assert err.count("error: ") == 1
    assert "Traceback" not in err
