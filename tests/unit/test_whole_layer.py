"""A decoder layer that the native kernel runs whole gives what its modules give one by one."""

from __future__ import annotations

import pytest
import torch
from tiny_models import hf_greedy, ragged_prompts, tiny_model

from inference_shardformer import InferenceConfig, InferenceShardformer, SamplingParams, ShardConfig
from inference_shardformer.attention.proof import Trial, make_trial
from inference_shardformer.errors import BackendUnavailableError
from inference_shardformer.kernels.cpu.library import native_problem
from inference_shardformer.modeling.nopadding_decoder_layer import NoPaddingDecoderLayer

pytestmark = pytest.mark.skipif(native_problem() is not None, reason="there are no native kernels here")

SEQUENCES = [(1, 17), (1, 3), (1, 40), (9, 9), (4, 11), (33, 33)]  # (query tokens, visible tokens)
TOLERANCES = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}  # of the largest value
CASES = [
    ("gqa", "fp32", None),
    ("mqa", "fp32", None),
    ("biased", "fp32", None),
    ("explicit_head_dim", "fp32", None),
    ("gqa", "bf16", None),
    ("biased", "fp16", None),
    ("gqa", "bf16", "int8"),
]


def _served(case: str, dtype: str, quantization: str | None) -> InferenceShardformer:
    config = {"dtype": dtype, "weights": {"quantization": quantization}, "kernels": {"decoder_layer": "cpu"}}
    shardformer = InferenceShardformer(
        ShardConfig(device="cpu", threads_per_rank=2), InferenceConfig.model_validate(config)
    )
    shardformer.attach(shardformer.optimize(tiny_model(case))[0])
    return shardformer


def _both(layer: NoPaddingDecoderLayer, trial: Trial) -> tuple[torch.Tensor, torch.Tensor]:
    """The layer whole, and by its modules, over one ragged batch and the same past."""
    spec = layer.backend.spec
    tokens = trial.batch.num_tokens
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(1, tokens, layer.self_attn.qkv_proj.in_features, generator=generator).to(spec.dtype)
    angles = torch.rand(1, tokens, spec.head_dim // 2, generator=generator).repeat(1, 1, 2) * 6
    positions = angles.cos().to(spec.dtype), angles.sin().to(spec.dtype)
    past = [tensor.clone() for tensor in trial.kv_cache.layer(0)]
    with torch.inference_mode():
        meta = layer.backend.plan(trial.batch, trial.kv_cache)
        whole = layer._run(hidden, positions, meta)
        written = [tensor.clone() for tensor in trial.kv_cache.layer(0)]
        for tensor, old in zip(trial.kv_cache.layer(0), past, strict=True):
            tensor.copy_(old)
        modular = layer.run_modules(hidden, positions, layer.backend.plan(trial.batch, trial.kv_cache))
    for ours, theirs in zip(written, trial.kv_cache.layer(0), strict=True):
        _check_close(ours, theirs, spec.dtype)
    return whole, modular


def _check_close(ours: torch.Tensor, theirs: torch.Tensor, dtype: torch.dtype) -> None:
    assert (ours - theirs).abs().max().item() <= TOLERANCES[dtype] * theirs.abs().max().item()


@pytest.mark.parametrize(("case", "dtype", "quantization"), CASES)
def test_a_whole_layer_equals_its_modules(isa_level: str, case: str, dtype: str, quantization: str | None) -> None:
    with _served(case, dtype, quantization) as shardformer:
        layer = shardformer.sharded.model.model.layers[0]
        assert isinstance(layer, NoPaddingDecoderLayer)
        layer.register_forward_hook(lambda *_: None)  # a layer that is watched runs by itself
        assert layer._run != layer.run_modules
        trial = make_trial(layer.backend.spec, SEQUENCES, layer.backend.capabilities.kv_layout)
        whole, modular = _both(layer, trial)
        _check_close(whole, modular, layer.backend.spec.dtype)


@pytest.mark.parametrize("case", ["gqa", "mqa", "biased", "tied", "rope_llama3"])
def test_tokens_equal_hugging_face(case: str) -> None:
    model = tiny_model(case)
    prompts = ragged_prompts(5, model.config.vocab_size)
    expected = [hf_greedy(model, prompt, 12) for prompt in prompts]
    config = InferenceConfig.model_validate({"dtype": "fp32", "kernels": {"decoder_layer": "cpu"}})
    with InferenceShardformer(ShardConfig(device="cpu", threads_per_rank=2), config) as shardformer:
        engine = shardformer.attach(shardformer.optimize(model)[0])
        outputs = engine.generate(prompts, SamplingParams(max_new_tokens=12, ignore_eos=True))
        assert [list(output.token_ids) for output in outputs] == expected


def test_hooks_see_every_layer_and_change_no_token() -> None:
    model = tiny_model("gqa")
    with torch.inference_mode():
        expected = model(torch.tensor([[3, 1, 4, 1, 5]]), output_hidden_states=True).hidden_states[1][0]
    config = InferenceConfig.model_validate({"dtype": "fp32", "kernels": {"decoder_layer": "cpu"}})
    seen: list[torch.Tensor] = []
    with InferenceShardformer(ShardConfig(device="cpu", threads_per_rank=1), config) as shardformer:
        engine = shardformer.attach(shardformer.optimize(model)[0])
        chained = engine.generate([[3, 1, 4, 1, 5]], SamplingParams(max_new_tokens=8, ignore_eos=True))
        first = shardformer.sharded.model.model.layers[0]
        handle = first.register_forward_hook(lambda module, args, out: seen.append(out[0].clone()))
        watched = engine.generate([[3, 1, 4, 1, 5]], SamplingParams(max_new_tokens=8, ignore_eos=True))
        handle.remove()
        again = engine.generate([[3, 1, 4, 1, 5]], SamplingParams(max_new_tokens=8, ignore_eos=True))
    assert watched[0].token_ids == chained[0].token_ids == again[0].token_ids
    assert len(seen) == 8
    assert torch.allclose(seen[0], expected, atol=1e-5)


def test_another_attention_backend_brings_the_modules_back() -> None:
    with _served("gqa", "fp32", None) as shardformer:
        layer = shardformer.sharded.model.model.layers[0]
        engine = shardformer._engine
        assert engine is not None
        engine.switch_backend("sdpa")
        assert layer._run == layer.run_modules
        engine.switch_backend("cpu")
        assert layer._run != layer.run_modules


def test_a_layer_that_cannot_run_whole_is_refused_by_name() -> None:
    config = InferenceConfig.model_validate(
        {"dtype": "fp32", "attention": {"backend": "sdpa"}, "kernels": {"decoder_layer": "cpu"}}
    )
    with InferenceShardformer(ShardConfig(device="cpu"), config) as shardformer:
        with pytest.raises(BackendUnavailableError, match="needs attention by cpu, and that is by sdpa"):
            shardformer.optimize(tiny_model("gqa"))
