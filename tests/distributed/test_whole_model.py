"""A model in one native call on two real ranks, which add up its embedding and its layers in shared memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ranks import run_ranks
from tiny_models import hf_greedy, ragged_prompts, tiny_model

from inference_shardformer.kernels.cpu.library import native_problem


@pytest.mark.skipif(native_problem() is not None, reason="there are no native kernels here")
def test_tokens_are_those_of_hugging_face_and_one_rank_alone_may_be_watched(tmp_path: Path) -> None:
    prompts = ragged_prompts(18, 150)
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    results = run_ranks("whole_model_ranks.py", str(tmp_path / "prompts.json"), nproc=2, timeout_s=120)
    assert [result.returncode for result in results] == [0, 0], results[-1].stderr[-4000:]
    for rank, said in enumerate(result.said for result in results):
        for case, (whole, watched) in said.items():
            expected = [hf_greedy(tiny_model(case), prompt, 5) for prompt in prompts]
            assert whole["tokens"] == watched["tokens"] == expected
            assert not whole["by_modules"]
            assert watched["by_modules"] is (rank == 0)
