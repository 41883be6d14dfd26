"""The lean forward pass of a whole model: the same logits, the same hooks, and Hugging Face's own where it must be."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny_models import tiny_model
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedModel

from inference_shardformer import InferenceConfig, InferenceShardformer, SamplingParams, ShardConfig
from inference_shardformer.modeling.packed_forward import PackedForward, PlainForward, forward_of
from inference_shardformer.policies.llama import LlamaPolicy

PROMPT = [[3, 1, 4, 1, 5]]


class Scaled(LlamaForCausalLM):
    """A model of the user's own, which does something that LLaMA does not."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = -output.logits
        return output


@pytest.fixture
def shardformer() -> Iterator[InferenceShardformer]:
    with InferenceShardformer(ShardConfig(device="cpu"), InferenceConfig(dtype="fp32")) as made:
        yield made


def tokens_of(shardformer: InferenceShardformer, model: PreTrainedModel) -> list[int]:
    engine = shardformer.attach(shardformer.optimize(model)[0])
    return list(engine.generate(PROMPT, SamplingParams(max_new_tokens=6, ignore_eos=True))[0].token_ids)


def calls(module: nn.Module) -> list[str]:
    seen: list[str] = []
    module.register_forward_hook(lambda module, args, output: seen.append(type(module).__name__))
    return seen


def test_logits_are_those_of_hugging_faces_forward(
    shardformer: InferenceShardformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    lean = PackedForward.__call__

    def both(self: PackedForward, **inputs: Any) -> Any:
        output = lean(self, **inputs)
        seen.append((output.logits.clone(), self._model(**inputs).logits[0]))
        return output

    monkeypatch.setattr(PackedForward, "__call__", both)
    tokens_of(shardformer, tiny_model("gqa"))
    assert len(seen) == 6
    assert all(torch.equal(ours, theirs) for ours, theirs in seen)


@pytest.mark.parametrize("path", ["model.embed_tokens", "model.layers.1", "model.norm", "lm_head"])
def test_hooks_on_modules_are_called_in_every_step(shardformer: InferenceShardformer, path: str) -> None:
    model, _ = shardformer.optimize(tiny_model("gqa"))
    engine = shardformer.attach(model)
    seen = calls(model.get_submodule(path))
    engine.generate(PROMPT, SamplingParams(max_new_tokens=6, ignore_eos=True))
    assert len(seen) == 6


@pytest.mark.parametrize("path", ["", "model"])
def test_hooks_on_the_whole_model_get_hugging_faces_own_call(shardformer: InferenceShardformer, path: str) -> None:
    expected = tokens_of(shardformer, tiny_model("gqa"))
    with InferenceShardformer(ShardConfig(device="cpu"), InferenceConfig(dtype="fp32")) as other:
        model, _ = other.optimize(tiny_model("gqa"))
        engine = other.attach(model)
        seen = calls(model.get_submodule(path))
        outputs = engine.generate(PROMPT, SamplingParams(max_new_tokens=6, ignore_eos=True))
    assert seen == [type(model.get_submodule(path)).__name__] * 6
    assert list(outputs[0].token_ids) == expected


def test_a_forward_of_the_users_own_is_called(shardformer: InferenceShardformer) -> None:
    expected = tokens_of(shardformer, tiny_model("gqa"))
    model = Scaled(tiny_model("gqa").config)
    model.load_state_dict(tiny_model("gqa").state_dict())
    with InferenceShardformer(ShardConfig(device="cpu"), InferenceConfig(dtype="fp32")) as other:
        sharded, _ = other.optimize(model.eval(), LlamaPolicy())
        assert isinstance(forward_of(sharded, "llama"), PlainForward)
        engine = other.attach(sharded)
        found = engine.generate(PROMPT, SamplingParams(max_new_tokens=6, ignore_eos=True))[0].token_ids
    assert list(found) != expected
