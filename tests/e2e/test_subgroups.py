"""Engines inside process groups that the caller made: two halves and the whole world, alternately."""

from __future__ import annotations

import json
from pathlib import Path

from ranks import run_ranks
from tiny_models import hf_greedy, ragged_prompts, save_tiny_model


def test_engines_on_subgroups_and_on_the_world(tmp_path: Path) -> None:
    model = save_tiny_model("gqa", tmp_path)
    prompts = ragged_prompts(3, model.config.vocab_size)
    expected = [hf_greedy(model, prompt, 8) for prompt in prompts]
    results = run_ranks("subgroup_ranks.py", str(tmp_path), json.dumps(prompts), nproc=4, timeout_s=120)
    for result in results:
        assert result.returncode == 0, result.stderr
        assert result.said == {"half": expected, "world": expected, "callers_groups_still_work": True}
