"""The verifier on real ranks: it passes what is right, and every rank names the same module for what is not."""

from __future__ import annotations

from pathlib import Path

from ranks import run_ranks
from tiny_models import save_tiny_model


def test_real_ranks_verify_and_name_a_defect(tmp_path: Path) -> None:
    save_tiny_model("gqa", tmp_path)
    ranks = run_ranks("verify_ranks.py", str(tmp_path), nproc=2)
    assert [rank.returncode for rank in ranks] == [0, 0], ranks[0].stderr[-3000:]
    for rank in ranks:
        sound, broken = rank.lines
        assert sound["passed"], sound
        assert sound["ranks"] == "real"
        assert broken["checks"]["activations"] == "failed"
        assert broken["findings"][0]["module"] == "model.layers.1.mlp.down_proj"
