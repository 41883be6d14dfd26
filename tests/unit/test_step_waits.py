"""A step waits for the device once, for the ids that it sampled: nothing before reads what a tensor holds."""

from __future__ import annotations

import pytest
import torch
from tiny_models import ragged_prompts, tiny_model
from waiting import Watch

from inference_shardformer import InferenceConfig, InferenceShardformer, SamplingParams, ShardConfig

SAMPLING = {
    "greedy": {},
    "drawn": {"temperature": 0.8, "seed": 1},
    "top_k": {"temperature": 0.8, "top_k": 5, "seed": 1},
    "top_p": {"temperature": 0.8, "top_p": 0.7, "seed": 1},
    "penalty": {"repetition_penalty": 1.3},
    "ngrams": {"no_repeat_ngram_size": 2},
    "presence": {"presence_penalty": 1.0, "frequency_penalty": 0.5},
    "bias": {"logit_bias": {3: 1.0}},
    "min_p": {"temperature": 0.8, "min_p": 0.1, "seed": 1},
    "min_new_tokens": {"min_new_tokens": 3, "stop_token_ids": (4,)},
}


@pytest.fixture(scope="module")
def engine():
    """Through plain torch modules and kernels, which is what a device runs."""
    model = tiny_model("gqa")
    kernels = {"linear": "torch", "norm": "torch", "activation": "torch", "decoder_layer": "modules"}
    settings = {
        "attention": {"backend": "sdpa"},
        "dtype": "fp32",
        "cache": {"block_size": 4, "num_blocks": 64},
        "kernels": kernels,
    }
    shardformer = InferenceShardformer(ShardConfig(device="cpu"), InferenceConfig.model_validate(settings))
    shardformer.optimize(model)
    yield shardformer.attach(model)
    shardformer.close()


def _watched_steps(engine, monkeypatch, params: list[SamplingParams]) -> list[list[str]]:
    for prompt, sampling in zip(ragged_prompts(len(params), 160), params, strict=True):
        engine.add_request(prompt, sampling)
    steps = []
    while engine.has_unfinished():
        with monkeypatch.context() as patch:
            watch = Watch(patch)
            with watch:
                engine.step()
        steps.append(watch.found)
    return steps


@pytest.mark.parametrize("name", SAMPLING)
def test_a_step_waits_once(engine, monkeypatch, name) -> None:
    params = [SamplingParams(max_new_tokens=4, ignore_eos=True, **SAMPLING[name])] * 3
    steps = _watched_steps(engine, monkeypatch, params)
    assert len(steps) == 4
    assert steps == [["tolist"]] * 4


def test_a_mixed_step_waits_once_too(engine, monkeypatch) -> None:
    params = [SamplingParams(max_new_tokens=3, ignore_eos=True, **each) for each in SAMPLING.values()]
    assert _watched_steps(engine, monkeypatch, params) == [["tolist"]] * 3


def test_the_watch_sees_what_it_should(monkeypatch) -> None:
    rows = torch.arange(4)
    with monkeypatch.context() as patch:
        watch = Watch(patch)
        with watch:
            rows.unique()
            rows[rows > 1]
            rows.tolist()
            bool(rows[0])
    assert {"tolist", "__bool__", "index by a mask"} <= set(watch.found)
    assert any("unique" in each for each in watch.found)


def test_log_probabilities_come_with_the_ids(engine, monkeypatch) -> None:
    params = [SamplingParams(max_new_tokens=3, ignore_eos=True, logprobs=num) for num in (None, 0, 4)]
    assert _watched_steps(engine, monkeypatch, params) == [["tolist", "tolist"]] * 3
