"""Saving, unsharding and new weights on real ranks, against the original checkpoint's bytes and Hugging Face."""

from __future__ import annotations

import pytest
from ranks import run_ranks
from reversing import digest
from safetensors.torch import load_file
from tiny_models import hf_greedy, save_tiny_model, tiny_model

PROMPT = [3, 14, 15, 9, 2]


@pytest.mark.parametrize(
    ("case", "nproc"),
    [("odd_vocabulary_tied", 2), ("gqa_fewer_kv_heads_than_ranks", 4)],
    ids=["tied-odd-2", "fewer-kv-heads-4"],
)
def test_there_and_back(case, nproc, tmp_path):
    original = save_tiny_model(case, tmp_path / "original")
    before, expected = digest(original.state_dict()), hf_greedy(original, PROMPT, 6)
    new = tiny_model(case, seed=7)
    ranks = run_ranks("reversing_ranks.py", case, str(tmp_path), nproc=nproc)
    assert [rank.returncode for rank in ranks] == [0] * nproc, ranks[0].stderr
    for said in (rank.said for rank in ranks):
        assert said["digest"] == said["after an error"] == before
        assert said["greedy"] == expected
        assert said["tokens"] == hf_greedy(new, PROMPT, 6)
        assert said["failure"] == [
            "RankFailure",
            "rank 1 failed during weight update: the iterator raised OSError: the trainer has gone",
        ]
    saved = {
        name: tensor for path in (tmp_path / "saved").glob("*.safetensors") for name, tensor in load_file(path).items()
    }
    assert digest(saved) == digest(load_file(tmp_path / "original" / "model.safetensors"))
    renewed = digest(load_file(tmp_path / "renewed" / "model.safetensors"))
    assert renewed == {name: value for name, value in digest(new.state_dict()).items() if name in renewed}
    assert set(renewed) == set(saved)
