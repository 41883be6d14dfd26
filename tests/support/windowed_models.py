"""A LLaMA-shaped model whose odd layers see a sliding window: policy, weights, and Hugging Face as the oracle."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from tiny_models import tiny_config
from transformers import LlamaConfig, LlamaForCausalLM, PretrainedConfig

from inference_shardformer.attention.survey import BACKENDS
from inference_shardformer.config.model import ModelFacts
from inference_shardformer.policies.llama import LlamaPolicy

WINDOW = 6
WINDOWS = (None, WINDOW, None, WINDOW)


class WindowedLlamaPolicy(LlamaPolicy):
    """Shards LLaMA as ever, with a window in every other layer."""

    def facts(self, hf_config: PretrainedConfig) -> ModelFacts:
        return replace(super().facts(hf_config), sliding_windows=WINDOWS)


def windowed_config() -> LlamaConfig:
    """Four layers."""
    config = tiny_config("gqa")
    config.num_hidden_layers = len(WINDOWS)
    return config


def windowed_model() -> LlamaForCausalLM:
    """Weights that are spread wide, so that greedy choices are no near-ties."""
    torch.manual_seed(3)
    model = LlamaForCausalLM(windowed_config()).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(1 + torch.randn_like(parameter) * 0.1 if parameter.dim() == 1 else 0)
            if parameter.dim() > 1:
                parameter.normal_(std=0.25)
    model.generation_config.eos_token_id = None
    return model


def greedy(model: LlamaForCausalLM, prompt: list[int], max_new_tokens: int, *, windows: tuple = WINDOWS) -> list[int]:
    """What Hugging Face continues a prompt with, computing everything anew for every token, with a mask per layer."""
    model.config._attn_implementation = "eager"  # which takes any mask
    hooks = [
        layer.self_attn.register_forward_pre_hook(_masked(window), with_kwargs=True)
        for layer, window in zip(model.model.layers, windows, strict=True)
    ]
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(max_new_tokens):
            tokens.append(int(model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
    for hook in hooks:
        hook.remove()
    return tokens[len(prompt) :]


def _masked(window: int | None) -> Any:
    """A hook that hands attention a causal mask of one window."""

    def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        position = torch.arange(hidden.shape[1])
        distance = position[:, None] - position[None, :]
        seen = (distance >= 0) & (distance < (window or len(position)))
        mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
        return args, {**kwargs, "attention_mask": mask[None, None]}

    return hook


def plain_backends() -> dict[str, Any]:
    """Entries of the registry for sdpa and the reference alone, so that what is built here does not matter."""
    return {name: BACKENDS._entries[name] for name in ("sdpa", "reference")}
