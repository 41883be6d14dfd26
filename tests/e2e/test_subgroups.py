"""Engines inside process groups that the caller made: two halves and the whole world, alternately."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from ranks import SUPPORT, run_ranks
from tiny_models import hf_greedy, ragged_prompts, save_tiny_model


def test_engines_on_subgroups_and_on_the_world(tmp_path: Path) -> None:
    model = save_tiny_model("gqa", tmp_path)
    prompts = ragged_prompts(3, model.config.vocab_size)
    expected = [hf_greedy(model, prompt, 8) for prompt in prompts]
    results = run_ranks("subgroup_ranks.py", str(tmp_path), json.dumps(prompts), nproc=4, timeout_s=120)
    for result in results:
        assert result.returncode == 0, result.stderr
        assert result.said == {"half": expected, "world": expected, "callers_groups_still_work": True}


def test_one_engine_after_the_other_under_a_launcher(tmp_path: Path) -> None:
    model = save_tiny_model("gqa", tmp_path)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    done = subprocess.run(
        [*command, str(SUPPORT / "again_ranks.py"), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    expected = hf_greedy(model, [3, 1, 4], 6)
    assert json.loads(done.stdout.splitlines()[-1]) == {"tokens": [expected, expected], "left_behind": False}
