"""The engine with every Triton kernel that it can be given, in Triton's interpreter, beside Hugging Face.

Not collected by its name: `test_triton_interpreted.py` runs it in a process of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import triton_interpreter
from family_models import family_model, greedy
from tiny_models import hf_greedy, ragged_prompts, tiny_model

from inference_shardformer import InferenceConfig, InferenceShardformer, SamplingParams, ShardConfig
from inference_shardformer.attention.triton import TritonAttention
from inference_shardformer.compute.triton_activation import TritonActivation
from inference_shardformer.compute.triton_norm import TritonNorm
from inference_shardformer.compute.triton_rotary_write import TritonRotaryWrite
from inference_shardformer.compute.triton_sampling import TritonSampling
from inference_shardformer.layers.norm import RMSNorm
from inference_shardformer.modeling.nopadding_attention import NoPaddingRotaryAttention
from inference_shardformer.modeling.nopadding_decoder_layer import NoPaddingDecoderLayer

triton_interpreter.mend_bfloat16()

KINDS = (TritonAttention, TritonNorm, TritonActivation, TritonRotaryWrite, TritonSampling)
KERNELS = {"linear": "torch", "norm": "triton", "rotary_write": "triton", "sampling": "triton"}
SAMPLED = {"temperature": 0.9, "top_k": 20, "top_p": 0.9}


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch) -> None:
    """In the interpreter the kernels run on the CPU, and need no library to be probed for."""
    for kind in KINDS:
        monkeypatch.setattr(kind, "capabilities", replace(kind.capabilities, devices=("cpu",)))
        monkeypatch.setattr(kind, "requires", ())


@contextmanager
def served(model: torch.nn.Module, *, attention: str = "sdpa", dtype: str = "fp32", **kernels: str) -> Iterator:
    settings = {"attention": {"backend": attention}, "dtype": dtype, "kernels": {**KERNELS, **kernels}}
    with InferenceShardformer(ShardConfig(device="cpu"), InferenceConfig.model_validate(settings)) as shardformer:
        sharded, _ = shardformer.optimize(model)
        yield sharded, shardformer.attach(sharded)


def tokens(engine, prompts: list[list[int]], count: int = 5, **sampling: object) -> list[list[int]]:
    asked = SamplingParams(max_new_tokens=count, ignore_eos=True, **sampling)
    return [list(output.token_ids) for output in engine.generate(prompts, asked)]


@pytest.mark.parametrize("case", ["gqa", "biased"])
def test_llama_has_every_kernel_and_hugging_faces_tokens(case):
    model = tiny_model(case)
    prompts = ragged_prompts(4, model.config.vocab_size, longest=12)
    expected = [hf_greedy(model, prompt, 5) for prompt in prompts]
    with served(model, attention="triton", activation="triton", decoder_layer="fused_add") as (sharded, engine):
        layer = sharded.model.layers[0]
        assert isinstance(layer, NoPaddingDecoderLayer)
        assert layer._run == layer.run_modules
        assert "backend=triton" in repr(layer.self_attn)
        assert "rotary=triton" in repr(layer.self_attn)
        assert tokens(engine, prompts) == expected


@pytest.mark.parametrize(
    ("case", "attention"),
    [("qwen3", "cpu"), ("phi3_partial_window", "sdpa"), ("gemma3", "sdpa"), ("gpt_neox", "cpu")],
)
def test_head_norms_partial_rotary_and_both_layouts(case, attention):
    model = family_model(case)
    prompts = ragged_prompts(3, model.config.vocab_size, longest=12)
    expected = [greedy(model, prompt, 4) for prompt in prompts]
    with served(model, attention=attention) as (sharded, engine):
        placed = [module for module in sharded.modules() if isinstance(module, NoPaddingRotaryAttention)]
        assert placed
        assert all("rotary=triton" in repr(module) for module in placed)
        assert tokens(engine, prompts, 4) == expected


def test_the_same_seeds_draw_the_same_tokens_as_with_torch(monkeypatch):
    prompts = ragged_prompts(5, 160, longest=12)
    drawn, calls, draw = [], [], TritonSampling.draw
    monkeypatch.setattr(TritonSampling, "draw", lambda *args, **given: calls.append(1) or draw(*args, **given))
    for sampling in ("triton", "torch"):
        with served(tiny_model("gqa"), norm="torch", rotary_write="torch", sampling=sampling) as (_, engine):
            calls.clear()
            drawn.append(tokens(engine, prompts, 6, seed=3, **SAMPLED))
            assert len(calls) == (6 if sampling == "triton" else 0)
            alone = tokens(engine, prompts[2:3], 6, seed=3, **SAMPLED)
            assert alone == drawn[-1][2:3]
    assert drawn[0] == drawn[1]
    assert len({token for row in drawn[0] for token in row}) > 5


def test_hooks_see_the_sum_and_the_norm_of_it():
    """A norm that is watched is called with the sum, as in Hugging Face's layer, and no token changes."""
    seen: dict[str, list[torch.Tensor]] = {}
    prompts = [[3, 1, 4, 1, 5]]
    for decoder_layer in ("fused_add", "modules"):
        found = seen.setdefault(decoder_layer, [])
        with served(tiny_model("gqa"), decoder_layer=decoder_layer) as (sharded, engine):
            plain = tokens(engine, prompts)
            norm = sharded.model.layers[1].post_attention_layernorm
            assert isinstance(norm, RMSNorm)
            norm.register_forward_hook(lambda _, args, out, found=found: found.extend((args[0].clone(), out.clone())))
            assert tokens(engine, prompts) == plain
    assert len(seen["modules"]) == 10
    for ours, theirs in zip(seen["fused_add"], seen["modules"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_the_sum_leaves_its_parts_as_they_are():
    from inference_shardformer.compute.base import ComputeSpec
    from inference_shardformer.compute.torch_kernels import TorchNorm

    spec = ComputeSpec(torch.device("cpu"), torch.bfloat16, 96, 128)
    gen = torch.Generator().manual_seed(0)
    x, residual = (torch.randn(1, 5, 96, generator=gen).bfloat16() for _ in range(2))
    weight, before = torch.randn(96, generator=gen).bfloat16(), residual.clone()
    for is_offset in (False, True):
        ours, right = (
            kernel(spec).add_rms_norm(x, residual, weight, 1e-5, is_offset=is_offset)
            for kernel in (TritonNorm, TorchNorm)
        )
        assert torch.equal(ours[1], right[1])
        torch.testing.assert_close(ours[0], right[0], rtol=2**-7, atol=1e-5)
        assert torch.equal(residual, before)
