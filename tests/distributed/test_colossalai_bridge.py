"""Through ColossalAI's own ModelSharder: tokens and logits of the unsharded model, and users' policies as they are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks
from tiny_models import CASES, hf_greedy, ragged_prompts, tiny_model

MAX_NEW_TOKENS = 8
BRIDGED = ("mha", "gqa", "gqa_fewer_kv_heads_than_ranks", "mqa", "tied", "biased", "odd_vocabulary_tied", "rope_llama3")
Result = Callable[[int], dict[str, Any]]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[list[int]]]]:
    """The work of every rank program, and what Hugging Face makes of it."""
    folder = tmp_path_factory.mktemp("colossalai")
    cases, tokens = {}, {}
    for case in BRIDGED:
        model = tiny_model(case)
        prompts = ragged_prompts(4, model.config.vocab_size)
        cases[case] = {"prompts": prompts, "max_new_tokens": MAX_NEW_TOKENS}
        tokens[case] = [hf_greedy(model, prompt, MAX_NEW_TOKENS) for prompt in prompts]
    (folder / "work.json").write_text(json.dumps({"cases": cases, "policies": cases["gqa"]}))
    return folder, tokens


@pytest.fixture(scope="module")
def result(expected: tuple[Path, dict[str, list[list[int]]]]) -> Result:
    """What the ranks of one tensor-parallel size found; each size is started once."""
    folder, found = expected[0], {}

    def run(tp_size: int) -> dict[str, Any]:
        if tp_size not in found:
            out = folder / f"tp{tp_size}.json"
            for rank in run_ranks("colossalai_ranks.py", str(folder), str(out), nproc=tp_size, timeout_s=300):
                assert rank.returncode == 0, rank.stderr[-4000:]
            found[tp_size] = json.loads(out.read_text())
        return found[tp_size]

    return run


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_tokens_and_logits_equal_the_unsharded_model(result: Result, expected, tp_size: int) -> None:
    found = result(tp_size)
    assert [case for case in BRIDGED if found[case]["tokens"] != expected[1][case]] == []
    assert [case for case in BRIDGED if not found[case]["off"] < 1e-4] == []
    assert [case for case in BRIDGED if found[case]["tied"] != CASES[case].get("tie_word_embeddings", False)] == []
    assert all(found[case]["explained"] for case in BRIDGED)


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_a_users_layer_serves_in_our_engine(result: Result, expected, tp_size: int) -> None:
    own = result(tp_size)["own_mlp"]
    assert own["tokens"] == expected[1]["gqa"]
    assert own["mlp"] == "OwnMLP"
    assert own["unshard"].startswith("StateError: unshard() would have to know how OwnMLP cuts its weights")


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_a_policy_of_colossalai_runs_unchanged(result: Result, tp_size: int) -> None:
    stock = result(tp_size)["stock"]
    assert stock["difference"] < 1e-4
    assert stock["gate"] == "Linear1D_Col"
    assert "StockPolicy sharded the model without them" in stock["attach"]


def test_what_model_sharder_would_skip_is_refused(result: Result) -> None:
    found = result(2)["forgetful"]
    assert found["error"].startswith("PolicyError: the policy describes what is in LlamaMLP, which is exchanged")
    assert found["is_restored"]


def test_a_policy_that_fails_leaves_the_model_as_it_was(result: Result) -> None:
    found = result(2)["failing"]
    assert found["error"].startswith("PolicyError: FailingPolicy failed in ColossalAI's ModelSharder: KeyError")
    assert found["is_restored"]


def test_colossalai_needs_the_mending_and_gets_it_for_a_while(result: Result) -> None:
    """Fails the day a release of ColossalAI mends CpuAccelerator: then drop the mending."""
    assert result(2)["mending"] == {
        "mended": ["get_rng_state", "manual_seed"],
        "before": "TypeError",
        "meanwhile": "",
        "after": "TypeError",
    }
