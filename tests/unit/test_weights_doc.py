"""docs/weights.md: its blocks run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tiny_models import save_tiny_model

PAGE = (Path(__file__).parents[2] / "docs" / "weights.md").read_text(encoding="utf-8")


def test_the_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INFERENCE_SHARDFORMER_SHARD__DEVICE", "cpu")
    save_tiny_model("tied", tmp_path / "model")
    names: dict[str, object] = {"path": tmp_path / "model", "folder": tmp_path}
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 3
    for block in blocks:
        exec(compile(block, "weights.md", "exec"), names)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "parts", "whole"]
