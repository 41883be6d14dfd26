"""Modules of the families by themselves: what they compute beside Hugging Face's, and what they refuse."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, ClassVar, cast

import pytest
import torch
from family_models import family_config, family_model
from torch import nn

from inference_shardformer.compute.base import ComputeSpec
from inference_shardformer.compute.experts import ExpertParts, ExpertsKernel, Mix
from inference_shardformer.compute.linear import LinearShape
from inference_shardformer.compute.torch_kernels import TorchActivation, TorchLinear, TorchNorm
from inference_shardformer.errors import UnsupportedModelError
from inference_shardformer.layers.layer_type_rotary import LayerTypeRotaryEmbedding
from inference_shardformer.layers.linear import ColumnParallelLinear, GateUpParallelLinear
from inference_shardformer.layers.norm import RMSNorm
from inference_shardformer.layers.rotary import RotaryEmbedding
from inference_shardformer.modeling.nopadding_attention import NoPaddingAttention, NoPaddingRotaryAttention
from inference_shardformer.modeling.nopadding_layer import NoPaddingPlainLayer
from inference_shardformer.modeling.nopadding_llama import NoPaddingLlamaMLP
from inference_shardformer.modeling.nopadding_moe import NoPaddingMoE, NoPaddingMoEWithLogits
from inference_shardformer.policies.registry import policy_for
from inference_shardformer.policies.rows import replicate
from inference_shardformer.sharding.plan import ModulePlan

HEADS, HEAD_DIM, HIDDEN = 2, 8, 16
KERNEL_SPEC = ComputeSpec(torch.device("cpu"), torch.float32, HIDDEN, 4)


class PlainBackend:
    """Attends one sequence by plain torch, and keeps nothing."""

    name = "plain"
    spec = SimpleNamespace(num_heads=HEADS, num_kv_heads=1, head_dim=HEAD_DIM, sliding_window=None)

    def write(self, k: torch.Tensor, v: torch.Tensor, cache: object, meta: object) -> None:
        self.k, self.v = k, v

    def attend(self, q: torch.Tensor, cache: object, meta: object) -> torch.Tensor:
        return q + self.k + self.v


class Metadata:
    kv_cache = SimpleNamespace(layer=lambda layer_idx: None)

    def of(self, layer_idx: int) -> object:
        return self


def _attention(module_class: type[NoPaddingAttention]) -> NoPaddingAttention:
    torch.manual_seed(0)
    qkv, out = nn.Linear(HIDDEN, (HEADS + 2) * HEAD_DIM), nn.Linear(HIDDEN, HIDDEN)
    return module_class(layer_idx=3, qkv_proj=qkv, o_proj=out, backend=cast("Any", PlainBackend()))


@torch.inference_mode()
def test_partial_rotary_leaves_the_rest_alone() -> None:
    module, x = _attention(NoPaddingRotaryAttention), torch.randn(1, 5, HIDDEN)
    cos, sin = torch.randn(1, 5, 4), torch.randn(1, 5, 4)
    out, _ = module(x, (cos, sin), attn_metadata=cast("Any", Metadata()))
    q, k, v = module.qkv_proj(x[0]).view(5, 4, HEAD_DIM).split((2, 1, 1), dim=1)
    turned = []
    for part in (q, k):
        turned_part = part.clone()
        first, second = part[..., :2], part[..., 2:4]
        turned_part[..., :2] = first * cos[0, :, None, :2] - second * sin[0, :, None, :2]
        turned_part[..., 2:4] = second * cos[0, :, None, 2:] + first * sin[0, :, None, 2:]
        turned.append(turned_part)
    expected = module.o_proj((turned[0] + turned[1] + v).reshape(1, 5, -1))
    torch.testing.assert_close(out, expected)


def test_rotary_attention_needs_cos_and_sin() -> None:
    with pytest.raises(TypeError, match="layer 3 was given no cos and sin"):
        _attention(NoPaddingRotaryAttention)(torch.randn(1, 5, HIDDEN), attn_metadata=cast("Any", Metadata()))


def test_attention_without_rotary_ignores_positions() -> None:
    module, x = _attention(NoPaddingAttention), torch.randn(1, 5, HIDDEN)
    q, k, v = module.qkv_proj(x[0]).view(5, 4, HEAD_DIM).split((2, 1, 1), dim=1)
    out, nothing = module(x, attn_metadata=cast("Any", Metadata()))
    torch.testing.assert_close(out, module.o_proj((q + k + v).reshape(1, 5, -1)))
    assert nothing is None
    assert not module.is_sliding
    assert "heads=2, kv_heads=1" in repr(module)


class Sums:
    """A group of one."""

    size = 1

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.mark.parametrize("normalises", [True, False])
@torch.inference_mode()
def test_mixture_equals_every_expert_weighted(normalises: bool) -> None:
    torch.manual_seed(0)
    gate = nn.Linear(HIDDEN, 4, bias=False)
    experts = {number: nn.Linear(HIDDEN, HIDDEN) for number in range(4)}
    settings = {"gate": gate, "experts": experts, "top_k": 2, "normalises": normalises, "group": cast("Any", Sums())}
    x = torch.randn(1, 7, HIDDEN)
    scores = gate(x).softmax(-1)
    kept = scores.masked_fill(scores < scores.topk(2).values[..., -1:], 0)
    weights = kept / kept.sum(-1, keepdim=True) if normalises else kept
    expected = sum(weights[..., number, None] * expert(x) for number, expert in experts.items())
    torch.testing.assert_close(NoPaddingMoE(**settings)(x), expected)
    out, logits = NoPaddingMoEWithLogits(**settings)(x)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(logits, gate(x)[0])
    assert "experts=4, top_k=2" in repr(NoPaddingMoE(**settings))


class Counted(ExpertsKernel):
    """Runs no expert, and says what it was bound to."""

    name: ClassVar[str] = "counted"
    parts: ExpertParts | None = None

    def bind(self, parts: ExpertParts) -> Mix:
        self.parts = parts
        return lambda tokens, weights, chosen: tokens * weights.sum(-1, keepdim=True) + chosen.shape[1]


def _expert(*, bias: bool) -> NoPaddingLlamaMLP:
    kernel = TorchLinear(KERNEL_SPEC)
    up = GateUpParallelLinear(
        kernel.weight(LinearShape(HIDDEN, 8, torch.float32)), bias=bias, activation=TorchActivation(KERNEL_SPEC)
    )
    down = ColumnParallelLinear(kernel.weight(LinearShape(4, HIDDEN, torch.float32)), bias=False)
    return NoPaddingLlamaMLP(gate_up_proj=up, down_proj=down, act_fn=nn.SiLU())


@pytest.mark.parametrize("bias", [False, True])
@torch.inference_mode()
def test_a_kernel_runs_the_experts_once_their_weights_are_there(bias: bool) -> None:
    kernel, experts = Counted(KERNEL_SPEC), {number: _expert(bias=bias and number == 1) for number in range(3)}
    gate = nn.Linear(HIDDEN, 3, bias=False)
    group = cast("Any", Sums())
    module = NoPaddingMoE(gate=gate, experts=experts, top_k=2, normalises=True, group=group, kernel=kernel)
    assert module._run == module.run_modules
    module.weights_loaded()
    assert (module._run == module.run_modules) is bias  # the kernel knows of no biases
    if bias:
        assert kernel.parts is None
        return
    assert [each.shape.out_features for each in kernel.parts.gate_up] == [8, 8, 8]
    assert [each.shape.in_features for each in kernel.parts.down] == [4, 4, 4]
    x = torch.randn(1, 5, HIDDEN)
    torch.testing.assert_close(module(x), x + 2)


@torch.inference_mode()
def test_the_norm_of_a_sum_is_called_as_a_module_while_it_is_watched() -> None:
    class Fused(TorchNorm):
        calls = 0

        def add_rms_norm(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
            Fused.calls += 1
            return super().add_rms_norm(*args, **kwargs)

    norm, seen = RMSNorm(HIDDEN, eps=1e-5, kernel=Fused(KERNEL_SPEC)), []
    norm.weight = nn.Parameter(torch.randn(HIDDEN))
    x, residual = torch.randn(1, 3, HIDDEN), torch.randn(1, 3, HIDDEN)
    plain = norm.of_sum(x, residual)
    assert Fused.calls == 1
    handle = norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    watched = norm.of_sum(x, residual)
    handle.remove()
    assert Fused.calls == 1
    assert torch.equal(seen[0], residual + x)
    for ours, theirs in zip(watched, plain, strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(plain[0], norm(residual + x))


def test_plain_layer_hands_keyword_arguments_on() -> None:
    class Attention(nn.Module):
        def forward(self, x: torch.Tensor, *, position_embeddings: object, attn_metadata: int) -> Any:
            return x * attn_metadata, None

    parts = {"mlp": nn.Identity(), "input_layernorm": nn.Identity(), "post_attention_layernorm": nn.Identity()}
    layer, x = NoPaddingPlainLayer(self_attn=Attention(), **parts), torch.randn(1, 2, 3)
    (out,) = layer(x, position_embeddings=None, attn_metadata=2)
    torch.testing.assert_close(out, 6 * x)


def test_rotary_by_type_of_layer() -> None:
    by_type = {
        "sliding_attention": RotaryEmbedding(torch.ones(2), 1.0),
        "full_attention": RotaryEmbedding(torch.zeros(2), 1.0),
    }
    module, positions = LayerTypeRotaryEmbedding(by_type), torch.arange(3)[None]
    assert not module(torch.zeros(1), positions, "full_attention")[1].any()
    assert torch.equal(module(torch.zeros(1), positions, "sliding_attention")[1][0, :, 0], torch.arange(3).sin())


def test_a_kept_module_leaves_the_native_one_as_it_was() -> None:
    native = nn.LayerNorm(4)
    kept = replicate("norm").build(ModulePlan("norm", "norm", "replicate", ()), native, cast("Any", None))
    kept.register_parameter("weight", nn.Parameter(torch.zeros(4)))
    assert native.weight.sum() == 4
    assert kept.eps == native.eps


def test_unknown_rope_type_is_refused_by_name() -> None:
    config = family_config("mistral")
    name = "rope_parameters" if hasattr(config, "rope_parameters") else "rope_scaling"
    setattr(config, name, {"rope_type": "spiral"})
    with pytest.raises(UnsupportedModelError, match="rope_type 'spiral'"):
        policy_for(type(family_model("mistral")).__name__).facts(config)
