"""Engine tokens of every family equal Hugging Face's unsharded `generate` at tp 1, 2 and 4."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from family_models import FAMILIES, family_model, family_prompts, greedy, save_family_model
from ranks import run_ranks

MAX_NEW_TOKENS = 12
# A case and settings that turn off what it is there for.
FEATURES: list[tuple[str, dict[str, Any]]] = [
    ("mistral_window", {"sliding_window": None}),
    ("qwen2_window", {"use_sliding_window": False}),
    ("qwen2_window", {"max_window_layers": 0}),
    ("qwen3_biased_window", {"use_sliding_window": False}),
    ("phi3_partial_window", {"partial_rotary_factor": 1.0}),
    ("phi3_longrope", {"original_max_position_embeddings": 250}),
    ("gemma2", {"attn_logit_softcapping": None}),
    ("gemma2", {"query_pre_attn_scalar": 24}),
    ("gemma2", {"sliding_window": 250}),
    ("gemma3", {"sliding_window": 250}),
    ("gemma3_linear_rope", {"rope_scaling": None}),
    ("gemma3_linear_rope", {"rope_local_base_freq": 1e6}),
    ("mixtral", {"num_experts_per_tok": 1}),
    ("qwen3_moe", {"norm_topk_prob": False}),
    ("gpt_neox", {"rotary_pct": 1.0}),
    ("gpt_neox", {"use_parallel_residual": False}),
]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[list[int]]]]:
    """Checkpoints and prompts of every family, and what Hugging Face makes of them."""
    folder = tmp_path_factory.mktemp("families")
    prompts: dict[str, object] = {}
    expected: dict[str, list[list[int]]] = {}
    for case in FAMILIES:
        model = save_family_model(case, folder / case)
        requests = family_prompts(model.config.vocab_size)
        prompts[case] = {"prompts": requests, "max_new_tokens": MAX_NEW_TOKENS}
        expected[case] = [greedy(model, prompt, MAX_NEW_TOKENS) for prompt in requests]
    (folder / "prompts.json").write_text(json.dumps(prompts))
    return folder, expected


@pytest.mark.parametrize(
    ("tp_size", "routes"),
    [(1, ("from_pretrained",)), (2, ("from_pretrained", "optimize")), (4, ("from_pretrained",))],
    ids=["tp1", "tp2", "tp4"],
)
def test_tokens_equal_hugging_face(
    work: tuple[Path, dict[str, list[list[int]]]], tp_size: int, routes: tuple[str, ...]
) -> None:
    folder, expected = work
    out = folder / f"tp{tp_size}.json"
    for rank in run_ranks("family_ranks.py", str(folder), str(out), *routes, nproc=tp_size, timeout_s=400):
        assert rank.returncode == 0, rank.stderr[-4000:]
    results = json.loads(out.read_text())
    wrong = [
        f"{case} through {route}"
        for case, routes in results.items()
        for route, tokens in routes.items()
        if tokens != expected[case]
    ]
    assert not wrong


@pytest.mark.parametrize(
    ("case", "changed"),
    [(case, changed) for case, changed in FEATURES if case in FAMILIES],
    ids=[f"{case}-{next(iter(changed))}" for case, changed in FEATURES if case in FAMILIES],
)
def test_features_change_tokens(case: str, changed: dict[str, Any]) -> None:
    """The settings are such that ignoring a feature would be seen above."""
    model, without = family_model(case), family_model(case, **changed)
    prompts = family_prompts(model.config.vocab_size)
    assert any(greedy(model, prompt, 8) != greedy(without, prompt, 8) for prompt in prompts)
