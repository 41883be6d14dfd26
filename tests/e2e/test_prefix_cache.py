"""Requests that begin alike, on real ranks: their tokens are those of Hugging Face's unsharded model, found or not."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks
from tiny_models import hf_greedy, tiny_model

RNG = random.Random(0)
SYSTEM = [RNG.randrange(160) for _ in range(22)]
PROMPTS = [[*SYSTEM, *(RNG.randrange(160) for _ in range(length))] for length in (1, 3, 6, 9, 2, 13)] + [[5, 6, 7]]
EXPECTED = [hf_greedy(tiny_model("gqa"), prompt, 14) for prompt in PROMPTS]
TURNS = [[*prompt, *answer, 11, 12] for prompt, answer in zip(PROMPTS, EXPECTED, strict=True)]


@pytest.fixture(scope="module", params=[1, 2], ids=["tp1", "tp2"])
def said(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank said."""
    work = tmp_path_factory.mktemp("prefix") / "work.json"
    Path(work).write_text(json.dumps({"prompts": PROMPTS, "turns": TURNS}))
    results = run_ranks("prefix_ranks.py", str(work), nproc=request.param, timeout_s=120)
    assert [result.returncode for result in results] == [0] * request.param, results[-1].stderr[-4000:]
    return [result.said for result in results]


def test_ranks_saw_the_same(said: list[dict[str, Any]]) -> None:
    assert all(rank == said[0] for rank in said)


def test_tokens_are_those_of_hugging_face(said: list[dict[str, Any]]) -> None:
    for phase in ("roomy", "tight", "off", "switched"):
        assert [each["tokens"] for each in said[0][phase]] == [EXPECTED, EXPECTED], phase
    assert said[0]["reset"]["tokens"] == EXPECTED[:1]
    assert said[0]["turns"]["tokens"] == [hf_greedy(tiny_model("gqa"), turn, 14) for turn in TURNS]
    renewed = [hf_greedy(tiny_model("gqa", seed=7), prompt, 14) for prompt in PROMPTS]
    assert [each["tokens"] for each in said[0]["new weights"]] == [renewed, renewed]


def test_what_is_found(said: list[dict[str, Any]]) -> None:
    first, again = (each["found"] for each in said[0]["roomy"])
    assert first == 5 * 20  # five of six share the first one's five blocks
    assert again == sum((len(prompt) - 1) // 4 * 4 for prompt in PROMPTS)
    computed = [len(prompt) + 13 for prompt in PROMPTS]  # the last generated token was not fed back
    assert said[0]["turns"]["found"] == sum(num // 4 * 4 for num in computed)
    assert said[0]["reset"]["found"] == 0
    for phase in ("switched", "new weights"):
        assert [each["found"] for each in said[0][phase]] == [first, again], phase
    assert [each["found"] for each in said[0]["off"]] == [0, 0]


def test_preempted_requests_compute_less_again(said: list[dict[str, Any]]) -> None:
    """The same requests in the same small cache."""
    without, with_cache = said[0]["off"], said[0]["tight"]
    assert min(each["preempted"] for each in without) > 0
    assert sum(each["recomputed"] for each in with_cache) < sum(each["recomputed"] for each in without)
