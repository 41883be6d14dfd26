"""`doctor` on real ranks: alike, different, and one of them in trouble."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from ranks import run_ranks

COMMAND = [sys.executable, "-m", "inference_shardformer.cli.main", "doctor"]


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def doctor(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *words], capture_output=True, text=True, timeout=120, check=False)


def test_two_ranks_that_are_alike():
    done = doctor("--tp", "2", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    document = json.loads(done.stdout)
    assert document["can_serve"] is True
    assert document["differences"] == []
    assert [rank["rank"] for rank in document["ranks"]] == [0, 1]
    assert {rank["attention"]["proof"]["outcome"] for rank in document["ranks"]} == {"passed"}


def test_a_refused_backend_ends_all_ranks_with_3_and_one_report():
    done = doctor("--tp", "2", "--attention-backend", "spda")
    assert (done.returncode, done.stderr) == (3, "")
    assert done.stdout.count("2 ranks: spda cannot serve") == 1
    assert "did you mean 'sdpa'?" in " ".join(done.stdout.split())  # wherever the lines are broken
    assert "every rank found the same" in done.stdout


def test_what_differs_is_told_with_its_ranks(tmp_path):
    first, second = run_ranks("doctor_ranks.py", "uneven", str(tmp_path), "--json", nproc=2)
    assert (first.returncode, second.returncode) == (0, 0)
    assert second.lines == []
    found = {each["path"]: each["values"] for each in first.said["differences"]}
    assert found["environment.OMP_NUM_THREADS"] == {"0": "1", "1": "3"}
    assert found["plugins.plugged"]["0"] == "absent"
    assert "of uneven 1.2" in found["plugins.plugged"]["1"]
    assert found["attention.backends.plugged.verdict"] == {"0": "absent", "1": "refused"}
    assert any("crashed with SIGSEGV" in str(values) for values in found.values())


def test_a_rank_with_an_error_of_its_own_is_reported_by_the_first(tmp_path):
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_attention_heads": 3}
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_key_value_heads": 3, "hidden_size": 24}))
    first, second = run_ranks("doctor_ranks.py", "tall", str(tmp_path), "--json", nproc=2)
    assert (first.returncode, second.returncode) == (3, 3)
    assert second.lines == []
    assert [rank["rank"] for rank in first.said["ranks"]] == [0]
    assert "tp_size=2 is impossible" in first.said["missing"]["1"]
