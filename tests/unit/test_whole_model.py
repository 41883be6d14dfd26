"""A whole model in one native call: the logits of Hugging Face's model, and bit for bit those of its modules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import hf_greedy, ragged_prompts, tiny_model
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from inference_shardformer import InferenceConfig, InferenceShardformer, SamplingParams, ShardConfig
from inference_shardformer.errors import RequestError, StateError
from inference_shardformer.kernels.cpu.library import native_problem
from inference_shardformer.modeling.packed_forward import PackedForward

pytestmark = pytest.mark.skipif(native_problem() is not None, reason="there are no native kernels here")

NUM_TOKENS = 4
Logits = list[torch.Tensor]  # of every step, [num_logits, vocabulary]


def _config(dtype: str = "fp32", **scheduler: int) -> InferenceConfig:
    return InferenceConfig.model_validate({"dtype": dtype, "scheduler": scheduler, "cache": {"block_size": 4}})


def _run(
    monkeypatch: pytest.MonkeyPatch, case: str, config: InferenceConfig, prompts: list[list[int]], watched: str = ""
) -> tuple[Logits, list[list[int]], int]:
    """The logits of all steps, the tokens, and how often modules ran one by one; `watched` gets a hook."""
    logits: Logits = []
    by_modules: list[None] = []
    call, modules = PackedForward.__call__, PackedForward._by_modules

    def noting(self: PackedForward, **inputs: Any) -> Any:
        output = call(self, **inputs)
        logits.append(output.logits.clone())
        if output.greatest is not None:
            value, place = output.logits.max(dim=-1)
            assert torch.equal(output.greatest[0], value)
            assert torch.equal(output.greatest[1], place)
        return output

    def counting(self: PackedForward, *inputs: Any) -> torch.Tensor:
        by_modules.append(None)
        return modules(self, *inputs)

    with (
        monkeypatch.context() as patch,
        InferenceShardformer(ShardConfig(device="cpu", threads_per_rank=2), config) as s,
    ):
        patch.setattr(PackedForward, "__call__", noting)
        patch.setattr(PackedForward, "_by_modules", counting)
        model, _ = s.optimize(tiny_model(case))
        engine = s.attach(model)
        if watched:
            model.get_submodule(watched).register_forward_hook(lambda *_: None)
        outputs = engine.generate(prompts, SamplingParams(max_new_tokens=NUM_TOKENS, ignore_eos=True))
    return logits, [list(output.token_ids) for output in outputs], len(by_modules)


@pytest.mark.parametrize("case", ["gqa", "mqa", "biased", "tied", "odd_vocabulary_tied", "explicit_head_dim"])
def test_logits_are_those_of_hugging_face(isa_level: str, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    model, prompt = tiny_model(case), ragged_prompts(3, 150)[-1]
    logits, [tokens], num_by_modules = _run(monkeypatch, case, _config(), [prompt])
    with torch.inference_mode():
        expected = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
    assert torch.allclose(torch.cat(logits)[:, : expected.shape[1]], expected, rtol=1e-4, atol=1e-4)
    assert num_by_modules == 0


@pytest.mark.parametrize("rope", ["rope_linear", "rope_llama3", "rope_yarn", "rope_dynamic", "rope_longrope"])
def test_tokens_of_every_kind_of_rope_are_those_of_hugging_face(monkeypatch: pytest.MonkeyPatch, rope: str) -> None:
    prompts = [[3, 1, 4, 1, 5], [(7 * i) % 150 for i in range(29)]]  # the longer one crosses what it was trained for
    _, tokens, num_by_modules = _run(monkeypatch, rope, _config(), prompts)
    assert tokens == [hf_greedy(tiny_model(rope), prompt, NUM_TOKENS) for prompt in prompts]
    assert num_by_modules == 0


@pytest.mark.parametrize(
    ("case", "dtype", "watched"),
    [
        ("gqa", "fp32", "model.layers.1"),
        ("gqa", "bf16", "lm_head"),
        ("tied", "bf16", "model.rotary_emb"),
        ("tied", "fp16", "model.norm"),
    ],
)
def test_modules_give_the_same_bits(monkeypatch: pytest.MonkeyPatch, case: str, dtype: str, watched: str) -> None:
    """In prompts of many tokens, in pieces of prompts that give no logits, and in decodes of one row and of many."""
    prompts = ragged_prompts(20, 160)
    for config in (_config(dtype), _config(dtype, max_num_batched_tokens=7, max_num_seqs=6)):
        whole, tokens, num_whole = _run(monkeypatch, case, config, prompts)
        modular, its_tokens, num_modular = _run(monkeypatch, case, config, prompts, watched=watched)
        assert (num_whole, num_modular) == (0, len(modular))
        assert tokens == its_tokens
        assert len(whole) == len(modular)
        assert all(torch.equal(ours, its) for ours, its in zip(whole, modular, strict=True))


def test_a_hook_on_all_modules_of_torch_is_called() -> None:
    seen: list[str] = []
    with InferenceShardformer(ShardConfig(device="cpu"), _config()) as shardformer:
        engine = shardformer.attach(shardformer.optimize(tiny_model("gqa"))[0])
        handle = register_module_forward_hook(lambda module, args, output: seen.append(type(module).__name__))
        try:
            engine.generate([[3, 1, 4]], SamplingParams(max_new_tokens=2, ignore_eos=True))
        finally:
            handle.remove()
    assert seen.count("ParallelLMHead") == seen.count("VocabParallelEmbedding") == 2


def test_a_head_of_the_users_own_is_called() -> None:
    class Own(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.one_hot(torch.full(x.shape[:-1], 7), 160).float()

    with InferenceShardformer(ShardConfig(device="cpu"), _config()) as shardformer:
        model, _ = shardformer.optimize(tiny_model("gqa"))
        model.lm_head = Own()
        engine = shardformer.attach(model)
        outputs = engine.generate([[3, 1, 4]], SamplingParams(max_new_tokens=3, ignore_eos=True))
    assert list(outputs[0].token_ids) == [7, 7, 7]


class _Doubling(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * self.inner(x)


def _exchange_head(model: Any) -> None:
    model.lm_head = _Doubling(model.lm_head)


def _exchange_norm(model: Any) -> None:
    model.model.norm = _Doubling(model.model.norm)


def _exchange_norm_weight(model: Any) -> None:
    model.model.norm.weight = nn.Parameter(2 * model.model.norm.weight.detach(), requires_grad=False)


def _exchange_forward(model: Any) -> None:
    forward = model.lm_head.forward
    model.lm_head.forward = lambda x: 2 * forward(x)


@pytest.mark.parametrize("exchange", [_exchange_head, _exchange_norm, _exchange_norm_weight, _exchange_forward])
def test_what_is_exchanged_after_attach_takes_effect(monkeypatch: pytest.MonkeyPatch, exchange: Any) -> None:
    """Each doubles the logits, and so leaves the likeliest token."""
    seen: Logits = []
    call = PackedForward.__call__

    def noting(self: PackedForward, **inputs: Any) -> Any:
        output = call(self, **inputs)
        seen.append(output.logits.clone())
        return output

    monkeypatch.setattr(PackedForward, "__call__", noting)
    params = SamplingParams(max_new_tokens=3, ignore_eos=True)
    with InferenceShardformer(ShardConfig(device="cpu"), _config()) as shardformer:
        model, _ = shardformer.optimize(tiny_model("gqa"))
        engine = shardformer.attach(model)
        before = engine.generate([[3, 1, 4]], params)[0].token_ids
        exchange(model)
        assert engine.generate([[3, 1, 4]], params)[0].token_ids == before
    for once, twice in zip(seen[:3], seen[3:], strict=True):
        assert torch.allclose(2 * once, twice, rtol=1e-5)


def test_a_layer_that_is_exchanged_after_attach_is_refused() -> None:
    with InferenceShardformer(ShardConfig(device="cpu"), _config()) as shardformer:
        model, _ = shardformer.optimize(tiny_model("gqa"))
        engine = shardformer.attach(model)
        model.model.layers[1] = nn.Identity()
        with pytest.raises(StateError, match="are not those that it was attached with"):
            engine.generate([[3, 1, 4]], SamplingParams(max_new_tokens=2))


def test_new_weights_and_another_backend_take_effect() -> None:
    other, params = tiny_model("gqa", seed=5), SamplingParams(max_new_tokens=8, ignore_eos=True)
    prompt = [3, 1, 4, 1, 5]
    with InferenceShardformer(ShardConfig(device="cpu"), _config()) as shardformer:
        engine = shardformer.attach(shardformer.optimize(tiny_model("gqa"))[0])
        told = [list(engine.generate([prompt], params)[0].token_ids)]
        for backend in ("sdpa", "cpu"):
            engine.switch_backend(backend)
            told.append(list(engine.generate([prompt], params)[0].token_ids))
        engine.update_weights(dict(other.state_dict()))
        renewed = list(engine.generate([prompt], params)[0].token_ids)
    assert told == [hf_greedy(tiny_model("gqa"), prompt, 8)] * 3
    assert renewed == hf_greedy(other, prompt, 8) != told[0]


def test_logits_that_are_not_finite_end_their_request() -> None:
    with InferenceShardformer(ShardConfig(device="cpu"), _config()) as shardformer:
        model, _ = shardformer.optimize(tiny_model("gqa"))
        engine = shardformer.attach(model)
        with torch.no_grad():
            model.model.norm.weight[3] = torch.nan
        with pytest.raises(RequestError, match="not finite"):
            engine.generate([[3, 1, 4]], SamplingParams(max_new_tokens=3, ignore_eos=True))
