"""Layers wide enough to be shared out among threads: the same bits on any number of them, and Hugging Face's tokens."""

from __future__ import annotations

import pytest
import torch
from tiny_models import hf_greedy
from transformers import LlamaConfig, LlamaForCausalLM

from inference_shardformer import ConfigSources, InferenceConfig, InferenceShardformer, SamplingParams, ShardConfig
from inference_shardformer.kernels.cpu.library import native_problem
from inference_shardformer.modeling.packed_forward import PackedForward

pytestmark = pytest.mark.skipif(native_problem() is not None, reason="there are no native kernels here")

KINDS: dict[str, dict[str, object]] = {
    "fp32": {"dtype": "fp32"},
    "bf16": {"dtype": "bf16"},
    "uncompressed": {"dtype": "bf16", "weights": {"compression": "none"}},
    "int8": {"dtype": "bf16", "weights": {"quantization": "int8"}},
}
# Lengths of prompts that run in one step: few rows, those of a crew that prepares rows first, and those of a team.
STEPS = {"one": [1], "few": [3, 9], "prepared": [20], "ragged": [1, 17, 60, 101], "most": [255], "team": [200, 90]}


def wide_model(dtype: torch.dtype) -> LlamaForCausalLM:
    """At least eight panels in every projection: every thread of four gets a share."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=600,
        hidden_size=512,
        intermediate_size=544,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def prompts_of(lengths: list[int]) -> list[list[int]]:
    return [[(7 * row + 3 * place) % 600 for place in range(length)] for row, length in enumerate(lengths)]


def served(
    kind: str, model: LlamaForCausalLM, threads: int, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> tuple[list[torch.Tensor], list[list[int]]]:
    """The logits of every step, and the tokens."""
    seen: list[torch.Tensor] = []
    call = PackedForward.__call__

    def noting(self, **inputs):
        output = call(self, **inputs)
        seen.append(output.logits.clone())
        return output

    config = InferenceConfig.model_validate({**KINDS[kind], "kernels": {"decoder_layer": "cpu"}})
    shard, sources = ShardConfig(device="cpu", threads_per_rank=threads), ConfigSources(environ={})
    before = torch.get_num_threads()
    try:
        with monkeypatch.context() as patch, InferenceShardformer(shard, config, sources=sources) as shardformer:
            patch.setattr(PackedForward, "__call__", noting)
            engine = shardformer.attach(shardformer.optimize(model)[0])
            outputs = engine.generate(prompts, SamplingParams(max_new_tokens=3, ignore_eos=True))
    finally:
        torch.set_num_threads(before)
    return seen, [list(output.token_ids) for output in outputs]


@pytest.mark.parametrize("lengths", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("kind", KINDS)
def test_threads_change_no_bit(kind: str, lengths: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, dtype = prompts_of(lengths), torch.float32 if kind == "fp32" else torch.bfloat16
    alone, tokens = served(kind, wide_model(dtype), 1, prompts, monkeypatch)
    for threads in (2, 3, 4):
        together, same = served(kind, wide_model(dtype), threads, prompts, monkeypatch)
        assert same == tokens
        assert all(torch.equal(mine, its) for mine, its in zip(together, alone, strict=True))


@pytest.mark.parametrize("lengths", STEPS.values(), ids=STEPS)
def test_tokens_are_those_of_hugging_face(lengths: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = wide_model(torch.float32), prompts_of(lengths)
    expected = [hf_greedy(model, prompt, 3) for prompt in prompts]
    assert served("fp32", model, 2, prompts, monkeypatch)[1] == expected
