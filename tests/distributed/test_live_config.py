"""Live configuration on real ranks: random updates beside running requests change no result, at one step on all."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from live_config_ranks import MAX_NEW_TOKENS, SAMPLING
from ranks import run_ranks
from tiny_models import ragged_prompts, tiny_model

NUM_REQUESTS = 16


def _hugging_face(prompts: list[list[int]]) -> dict[int, list[int]]:
    """What Hugging Face generates for the requests that do not draw, by their index."""
    model = tiny_model("gqa")
    tokens = {}
    for index, prompt in enumerate(prompts):
        settings = SAMPLING[index % len(SAMPLING)]
        if "temperature" not in settings:
            ids = torch.tensor([prompt])
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=MAX_NEW_TOKENS,
                pad_token_id=0,
                **settings,
            )
            tokens[index] = out[0, len(prompt) :].tolist()
    return tokens


@pytest.mark.parametrize("nproc", [1, 2])
def test_live_updates_change_no_result_and_ranks_switch_together(tmp_path: Path, nproc: int) -> None:
    prompts = ragged_prompts(NUM_REQUESTS, tiny_model("gqa").config.vocab_size)
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    results = run_ranks("live_config_ranks.py", str(tmp_path / "prompts.json"), nproc=nproc, timeout_s=120)
    assert [result.returncode for result in results] == [0] * nproc, results[-1].stderr[-4000:]
    first = results[0].said

    expected = _hugging_face(prompts)
    for run in (first["serial"], first["updated"]["tokens"]):
        assert {index: run[index] for index in expected} == expected
    assert first["updated"]["tokens"] == first["serial"]
    assert len({tuple(expected[index]) for index in expected}) == len(expected)

    for result in results[1:]:
        assert result.said["serial"] == first["serial"]
        assert result.said["updated"] == first["updated"]  # the number of every step, its epoch and its batch
    epochs = [epoch for _, epoch, _, _ in first["updated"]["steps"]]
    assert len(set(epochs)) > 5
    assert all(before <= after for before, after in pairwise(epochs))

    refused = first["veto"]["refused"]
    assert len(refused) == 1
    assert "seven is too many" in refused[0]
    assert ("rank 1: " in refused[0]) == (nproc == 2)
    for result in results:
        assert result.said["veto"]["heard"] == [["told", 7], ["back", 7], ["told", 5]]
        assert result.said["veto"]["epochs"] == [["after", 1, 5], ["live", 0, 8]]
