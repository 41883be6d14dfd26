"""Measuring on two real ranks: they choose alike, by the slowest of them, and an engine takes that choice."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from ranks import run_ranks

from inference_shardformer.tuning.profile import TuningProfile

COMMAND = [sys.executable, "-m", "inference_shardformer.cli.main"]


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def command(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *words], capture_output=True, text=True, timeout=120, check=False)


def test_both_ranks_take_the_slowest_time():
    ranks = run_ranks("tuning_ranks.py", nproc=2)
    assert [(rank.returncode, rank.stderr) for rank in ranks] == [(0, ""), (0, "")]
    first, second = (rank.said for rank in ranks)
    assert first == second
    assert (first["choice"], first["num_ranks"]) == ("even", 2)
    assert {row["seconds"] for row in first["rows"] if row["backend"] == "uneven"} == {5.0}
    problems = {row["problem"] for row in first["rows"] if row["backend"] == "wrong"}
    assert problems == {"rank 1: it differs from the reference by up to 0.5, 0.002 is allowed"}


def test_two_ranks_measure_save_and_generate(tmp_path):
    profile = str(tmp_path / "profile.json")
    shape = ("--model", "demo", "--tp", "2", "--device", "cpu")
    grid = ("--phases", "decode", "--batches", "1", "--lengths", "16", "--repeat", "2")
    done = command("bench", "backends", *shape, *grid, "--json", "--save", profile)
    assert done.returncode == 0, done.stderr
    (document,) = [json.loads(line) for line in done.stdout.splitlines()]
    (entry,) = TuningProfile.load(profile).entries.values()
    assert entry.choice == document["choice"]
    sets = ("--attention-backend", "tuned", "--set", f"attention.profile={profile}")
    done = command("generate", *shape, *sets, "--prompt", "def", "--max-new-tokens", "2")
    assert done.returncode == 0, done.stderr
    assert f"attention  {document['choice']} (" in done.stderr
    assert f"tuned: profile {profile}" in done.stderr
