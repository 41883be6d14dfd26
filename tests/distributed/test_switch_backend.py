"""Another attention backend on two real ranks: both exchange it at one step, or neither does."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks
from tiny_models import hf_greedy, ragged_prompts, tiny_model

PHASES = ("unswitched", "by_all", "by_rank_0", "prepare", "bind")
PROMPTS = ragged_prompts(8, 160, longest=44)


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank said."""
    prompts = tmp_path_factory.mktemp("switch") / "prompts.json"
    Path(prompts).write_text(json.dumps(PROMPTS))
    results = run_ranks("switch_backend_ranks.py", str(prompts), nproc=2, timeout_s=120)
    assert [result.returncode for result in results] == [0, 0], results[-1].stderr[-4000:]
    return [result.said for result in results]


@pytest.mark.parametrize("phase", PHASES)
def test_tokens_are_those_of_hugging_face(said, phase):
    model = tiny_model("gqa")
    expected = [hf_greedy(model, prompt, 14) for prompt in PROMPTS]
    assert [rank[phase]["tokens"] for rank in said] == [expected, expected]


@pytest.mark.parametrize("phase", PHASES)
def test_ranks_use_the_same_backend_in_every_step(said, phase):
    assert said[0][phase]["used"] == said[1][phase]["used"]
    assert said[0][phase]["epoch"] == said[1][phase]["epoch"]
    for used in said[0][phase]["used"]:  # what serves is what the configuration says
        assert len(set(used.split())) == 1


@pytest.mark.parametrize("phase", ["by_all", "by_rank_0"])
def test_switches_take_effect_mid_generation(said, phase):
    turns = [used for used, _ in groupby(said[0][phase]["used"])]
    assert len(turns) > 6
    assert {used.split()[0] for used in turns} == {"reference", "sdpa", "transposed"}
    assert set(said[0][phase]["done"]) == {True}
    assert said[0][phase]["limit"] == said[1][phase]["limit"]
    assert len(said[1][phase]["done"]) == (len(said[0][phase]["done"]) if phase == "by_all" else 0)


@pytest.mark.parametrize(("phase", "text"), [("prepare", "rank 1 lacks a kernel"), ("bind", "rank 1 lost its device")])
def test_a_failure_on_rank_1_leaves_both_on_the_old_backend(said, phase, text):
    for rank in said:
        assert set(rank[phase]["used"]) == {"sdpa sdpa"}
        assert not any(rank[phase]["done"])
        kind, message = rank[phase]["errors"][0]
        assert kind == "BackendUnavailableError"
        assert message.startswith("rank 1: ")
        assert text in message
    assert said[0][phase]["errors"] == said[1][phase]["errors"]


def test_a_failing_proof_on_both_is_one_error(said):
    for rank in said:
        kind, message = rank["prepare"]["errors"][1]
        assert kind == "BackendUnavailableError"
        assert message.startswith("attention backend 'wrong' differs from the reference")


def test_what_rank_1_asks_for_alone_is_given_up(said):
    assert said[0]["alone"] is None
    assert said[1]["alone"][0] == "StateError"


def test_what_every_rank_can_see_is_refused_at_once(said):
    assert said[0]["refused"] == said[1]["refused"]
    assert "float32" in said[0]["refused"]
