"""Log-probabilities of real ranks against the unsharded Hugging Face model's log-softmax."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from tiny_models import ragged_prompts, save_tiny_model
from transformers import LlamaForCausalLM

NUM_TOKENS = 10
TOLERANCE = 2e-4  # float32 on both sides, whose logits differ in the order of their sums
PARAMS: list[dict[str, object]] = [
    {"logprobs": 5, "prompt_logprobs": 4},
    {"logprobs": 3, "temperature": 0.9, "seed": 3},
    {},
    {"logprobs": 20, "repetition_penalty": 1.4},
    {"logprobs": 0, "temperature": 1.3, "top_k": 8, "seed": 4},
    {"logprobs": 2, "prompt_logprobs": 0},
]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LlamaForCausalLM, list[list[int]]]:
    """A checkpoint whose vocabulary no number of ranks divides, and requests."""
    folder = tmp_path_factory.mktemp("logprobs")
    model = save_tiny_model("odd_vocabulary", folder)
    prompts = ragged_prompts(len(PARAMS), model.config.vocab_size, longest=16)
    params = [{"max_new_tokens": NUM_TOKENS, "ignore_eos": True, **each} for each in PARAMS]
    (folder / "requests.json").write_text(json.dumps({"prompts": prompts, "params": params}))
    return folder, model, prompts


def _logprobs(model: LlamaForCausalLM, token_ids: list[int]) -> torch.Tensor:
    """Float64 `[num_tokens, vocab_size]`, after each token."""
    with torch.inference_mode():
        return model(torch.tensor([token_ids])).logits[0].double().log_softmax(dim=-1)


def _assert_true(rows: torch.Tensor, token_ids: list[int], logprobs: list[dict], num_top: int) -> None:
    for row, token_id, found in zip(rows, token_ids, logprobs, strict=True):
        assert found["chosen"]["token_id"] == token_id
        assert len(found["top"]) == num_top
        for each in (found["chosen"], *found["top"]):
            assert each["logprob"] == pytest.approx(row[each["token_id"]].item(), abs=TOLERANCE)
        for place, likely in enumerate(found["top"]):
            assert likely["rank"] == place + 1
            assert likely["logprob"] == pytest.approx(row.sort(descending=True).values[place].item(), abs=TOLERANCE)
        num_likelier = int((row > row[token_id] + TOLERANCE).sum()), int((row > row[token_id] - TOLERANCE).sum())
        assert num_likelier[0] < found["chosen"]["rank"] <= num_likelier[1]


@pytest.mark.parametrize("tp_size", [1, 2])
def test_every_rank_has_those_of_hugging_face(
    work: tuple[Path, LlamaForCausalLM, list[list[int]]], tp_size: int
) -> None:
    folder, model, prompts = work
    out = folder / f"tp{tp_size}.json"
    for rank in run_ranks("logprob_ranks.py", str(folder), str(out), nproc=tp_size, timeout_s=120):
        assert rank.returncode == 0, rank.stderr[-4000:]
    results = json.loads(out.read_text())
    assert sum(result["num_preemptions"] for result in results["roomy"]) == 0
    assert sum(result["num_preemptions"] for result in results["tight"]) > 0
    for limits in ("roomy", "tight"):
        for prompt, params, result in zip(prompts, PARAMS, results[limits], strict=True):
            assert len(result["token_ids"]) == NUM_TOKENS
            expected = _logprobs(model, prompt + result["token_ids"])
            assert (result["logprobs"] is None) == ("logprobs" not in params)
            assert (result["prompt_logprobs"] is None) == ("prompt_logprobs" not in params)
            if "logprobs" in params:
                rows = expected[len(prompt) - 1 : -1]
                _assert_true(rows, result["token_ids"], result["logprobs"], params["logprobs"])
            if "prompt_logprobs" in params:
                rows = expected[: len(prompt) - 1]
                _assert_true(rows, prompt[1:], result["prompt_logprobs"][1:], params["prompt_logprobs"])
