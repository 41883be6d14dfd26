"""Triton's mixture of experts against its twin in float64 and Hugging Face, in Triton's interpreter.

Not collected by its name: `test_triton_interpreted.py` runs it in a process of its own.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import triton_interpreter
from family_models import family_model, greedy
from tiny_models import ragged_prompts
from waiting import Watch

from inference_shardformer import InferenceConfig, InferenceShardformer, SamplingParams, ShardConfig
from inference_shardformer.compute.base import ComputeSpec
from inference_shardformer.compute.experts import ExpertParts
from inference_shardformer.compute.linear import LinearShape
from inference_shardformer.compute.proof import GATES
from inference_shardformer.compute.proof_of_fused import prove_experts
from inference_shardformer.compute.torch_kernels import PlainWeight, TorchLinear
from inference_shardformer.compute.triton_experts import TritonExperts
from inference_shardformer.kernels import reference_experts
from inference_shardformer.kernels.triton import experts

triton_interpreter.mend_bfloat16()

CPU = torch.device("cpu")
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}  # of the largest value


def _parts(num_experts: int, hidden: int, size: int, dtype: torch.dtype) -> tuple[ExpertParts, list, list]:
    gen, held = torch.Generator().manual_seed(num_experts), []
    for out_features, in_features in ((2 * size, hidden), (hidden, size)):
        group = []
        for _ in range(num_experts):
            weight = PlainWeight(LinearShape(in_features, out_features, dtype))
            weight.adopt((torch.randn(out_features, in_features, generator=gen) / in_features**0.5).to(dtype))
            group.append(weight)
        held.append(group)
    plain = [[each.plain() for each in group] for group in held]
    return ExpertParts(*held, torch.nn.functional.silu), *plain


@pytest.mark.parametrize("activation", ["silu", "gelu_new", "relu"])
@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "top_k", "hidden", "size"),
    [(1, 4, 2, 64, 48), (7, 6, 2, 40, 24), (33, 3, 1, 16, 100), (150, 2, 2, 32, 32), (5, 70, 8, 16, 16)],
)
def test_mix(num_tokens, num_experts, top_k, hidden, size, activation):
    for dtype in TOLERANCES if activation == "silu" else (torch.float32,):
        _require_right((num_tokens, num_experts, top_k, hidden, size), dtype, activation)


def _require_right(shape: tuple[int, ...], dtype: torch.dtype, activation: str) -> None:
    num_tokens, num_experts, top_k, hidden, size = shape
    act = GATES.get(activation, torch.relu)
    parts, gate_up, down = _parts(num_experts, hidden, size, dtype)
    parts = replace(parts, act_fn=act)
    gen = torch.Generator().manual_seed(num_tokens)
    tokens = torch.randn(num_tokens, hidden, generator=gen).to(dtype)
    scores = torch.rand(num_tokens, num_experts, generator=gen)
    scores[:, 0] = 0 if num_experts > top_k else scores[:, 0]  # an expert that nobody meets
    weights, chosen = scores.topk(top_k, dim=-1)
    mix = TritonExperts(ComputeSpec(CPU, dtype, hidden, size, activation=activation, has_experts=True)).bind(parts)
    expected = reference_experts.mix(tokens, weights.to(dtype), chosen, gate_up=gate_up, down=down, act=act)
    out = mix(tokens, weights.to(dtype), chosen)
    assert (out.dtype, out.shape) == (dtype, expected.shape)
    assert (out.double() - expected).abs().max() <= TOLERANCES[dtype] * expected.abs().max()


def test_rows_are_sorted_by_expert_and_found_again():
    chosen = torch.tensor([[2, 0], [2, 3], [0, 2]])
    rows, places = experts.sort_by_expert(chosen, 5)
    assert rows.rows.tolist() == [0, 2, 0, 1, 2, 1]
    assert rows.ends.tolist() == [2, 2, 5, 6, 6]
    assert rows.rows[places].view(3, 2).tolist() == [[0, 0], [1, 1], [2, 2]]
    assert rows.ends.dtype == torch.int32


def test_weights_that_are_not_alike_are_refused():
    with pytest.raises(ValueError, match="alike and contiguous"):
        experts.expert_weights([torch.zeros(4, 2), torch.zeros(4, 3)])
    with pytest.raises(ValueError, match="alike and contiguous"):
        experts.expert_weights([torch.zeros(2, 4).T, torch.zeros(2, 4).T])


def test_the_proof_sees_a_wrong_expert(monkeypatch):
    spec = ComputeSpec(CPU, torch.float32, 64, 128, has_experts=True)
    prove_experts(TritonExperts(spec), TorchLinear(spec), spec)
    right = experts.sort_by_expert
    monkeypatch.setattr(experts, "sort_by_expert", lambda chosen, count: right(chosen.flip(1), count))
    with pytest.raises(Exception, match="experts kernel 'triton' differs"):
        prove_experts(TritonExperts(spec), TorchLinear(spec), spec)


@pytest.mark.parametrize("case", ["mixtral", "qwen3_moe"])
def test_the_engine_has_hugging_faces_tokens(case, monkeypatch):
    monkeypatch.setattr(TritonExperts, "capabilities", replace(TritonExperts.capabilities, devices=("cpu",)))
    monkeypatch.setattr(TritonExperts, "requires", ())
    model = family_model(case)
    prompts = ragged_prompts(3, model.config.vocab_size, longest=12)
    expected = [greedy(model, prompt, 4) for prompt in prompts]
    kernels = {"linear": "torch", "norm": "torch", "rotary_write": "torch", "activation": "torch", "experts": "triton"}
    settings = {"attention": {"backend": "sdpa"}, "dtype": "fp32", "kernels": kernels}
    with InferenceShardformer(ShardConfig(device="cpu"), InferenceConfig.model_validate(settings)) as shardformer:
        engine = shardformer.attach(shardformer.optimize(model)[0])
        outputs = engine.generate(prompts, SamplingParams(max_new_tokens=4, ignore_eos=True))
        assert [list(output.token_ids) for output in outputs] == expected


@torch.inference_mode()
def test_nothing_waits_for_the_experts_that_are_met(monkeypatch):
    """The launch itself is left out: the interpreter reads every tensor."""
    parts, _, _ = _parts(4, 16, 8, torch.float32)
    mix = TritonExperts(ComputeSpec(CPU, torch.float32, 16, 8, has_experts=True)).bind(parts)
    monkeypatch.setattr(experts, "experts_kernel", _Launches())
    watch = Watch(monkeypatch)
    with watch:
        mix(torch.randn(3, 16), torch.ones(3, 2), torch.tensor([[0, 1], [2, 3], [1, 0]]))
    assert watch.found == []


class _Launches:
    """A kernel that does nothing."""

    def __getitem__(self, grid: object) -> object:
        return lambda *args, **constants: None
