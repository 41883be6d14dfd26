"""Prefix caching where keys depend on more than tokens, and where queries see only some: tokens stay the same."""

from __future__ import annotations

import pytest
import torch
from family_models import FAMILIES, family_model, family_prompts, greedy
from tiny_models import hf_greedy, tiny_model
from transformers import PreTrainedModel

from inference_shardformer import ConfigSources, InferenceConfig, InferenceShardformer, SamplingParams

GREEDY = SamplingParams(max_new_tokens=10, ignore_eos=True)
CASES = ["mistral_window", "gemma2", "gemma3", "phi3_longrope", "phi3_partial_window", "qwen3", "mixtral", "opt"]


def _serve(model: PreTrainedModel, prompts: list[list[int]]) -> tuple[list[list[list[int]]], list[list[int]]]:
    """Tokens, and how many tokens were found, of the same prompts three times: together, again, and one by one."""
    cache = {"block_size": 4, "num_blocks": 80, "prefix_caching": "on"}
    inference = {"dtype": "fp32", "cache": cache, "scheduler": {"max_num_batched_tokens": 64}}
    tokens, found = [], []
    with InferenceShardformer(
        None, InferenceConfig.model_validate(inference), sources=ConfigSources(environ={})
    ) as shardformer:
        engine = shardformer.attach(shardformer.optimize(model)[0])
        for calls in ([prompts], [prompts], [[prompt] for prompt in prompts]):
            outputs = [output for call in calls for output in engine.generate(call, GREEDY)]
            tokens.append([list(output.token_ids) for output in outputs])
            found.append([output.usage.num_cached_tokens for output in outputs])
            engine._core.scheduler.check_integrity()
    return tokens, found


def _alike(prompts: list[list[int]]) -> list[list[int]]:
    """The prompts, and three that begin like the longest one."""
    longest = max(prompts, key=len)
    return [*prompts, [*longest[:18], 3, 4], [*longest[:18], 5], [*longest, 9, 8]]


@pytest.mark.parametrize("case", [case for case in CASES if case in FAMILIES])
def test_tokens_of_families_stay_the_same(case: str) -> None:
    model = family_model(case)
    prompts = _alike(family_prompts(model.config.vocab_size))
    expected = [greedy(model, prompt, GREEDY.max_new_tokens) for prompt in prompts]
    tokens, found = _serve(model, prompts)
    assert tokens == [expected] * 3
    assert sum(found[0]) >= 16
    assert sum(found[1]) > sum(found[0])


@pytest.mark.parametrize("case", ["rope_dynamic", "rope_longrope"])
def test_tokens_stay_the_same_where_keys_depend_on_the_length(case: str) -> None:
    torch.manual_seed(0)
    prompts = _alike(torch.randint(0, 150, (5, 30)).tolist())
    expected = [hf_greedy(tiny_model(case), prompt, GREEDY.max_new_tokens) for prompt in prompts]
    tokens, found = _serve(tiny_model(case), prompts)
    assert tokens == [expected] * 3
    assert found[1] == [(len(prompt) - 1) // 4 * 4 for prompt in prompts]  # each finds itself, of the same length
