"""Engine tokens equal Hugging Face's unsharded `generate` at tp 1, 2 and 4, for every feature of LLaMA.

Token by token through `from_pretrained`, with guesses through `optimize`.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ranks import run_ranks
from tiny_models import CASES, hf_greedy, ragged_prompts, save_tiny_model

MAX_NEW_TOKENS = 12
NUM_REQUESTS = {"gqa": 40, "rope_dynamic": 8, "rope_longrope": 8}  # the others: 5


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[list[int]]]]:
    """Checkpoints and prompts of every case, and what Hugging Face makes of them."""
    folder = tmp_path_factory.mktemp("parity")
    prompts: dict[str, object] = {}
    expected: dict[str, list[list[int]]] = {}
    for case in CASES:
        shards = "60KB" if case in ("gqa", "tied") else "5GB"
        model = save_tiny_model(case, folder / case, max_shard_size=shards)
        requests = ragged_prompts(NUM_REQUESTS.get(case, 5), model.config.vocab_size)
        prompts[case] = {"prompts": requests, "max_new_tokens": MAX_NEW_TOKENS}
        expected[case] = [hf_greedy(model, prompt, MAX_NEW_TOKENS) for prompt in requests]
    (folder / "prompts.json").write_text(json.dumps(prompts))
    return folder, expected


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_tokens_equal_hugging_face(work: tuple[Path, dict[str, list[list[int]]]], tp_size: int) -> None:
    folder, expected = work
    out = folder / f"tp{tp_size}.json"
    for rank in run_ranks("parity_ranks.py", str(folder), str(out), nproc=tp_size, timeout_s=300):
        assert rank.returncode == 0, rank.stderr[-4000:]
    results = json.loads(out.read_text())
    wrong = [
        f"{case} through {route}"
        for case, routes in results.items()
        for route, result in routes.items()
        if result["tokens"] != expected[case]
    ]
    assert not wrong
    num_guessed = {
        route: sum(routes[route]["num_guessed"] for routes in results.values())
        for route in ("from_pretrained", "optimize")
    }
    assert num_guessed["from_pretrained"] == 0 < num_guessed["optimize"]


def test_sharded_checkpoints_really_have_several_files(work: tuple[Path, dict[str, list[list[int]]]]) -> None:
    folder, _ = work
    assert len(list((folder / "gqa").glob("*.safetensors"))) > 1
