"""Tiny models with random weights of every family that has a policy; small windows and soft-caps, so they matter."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import baichuan_like
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

_BASE: dict[str, Any] = {
    "vocab_size": 151,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
_WINDOW = {"sliding_window": 7}
_GEMMA = {**_WINDOW, "head_dim": 24, "query_pre_attn_scalar": 10, "tie_word_embeddings": True}

_ABSENT = object()  # for settings that a model type does not have
_MHA = {"num_key_value_heads": _ABSENT}
_EXPERTS = {"num_experts_per_tok": 2}
_QWEN3_MOE = {**_EXPERTS, "num_experts": 6, "moe_intermediate_size": 24, "head_dim": 24}
baichuan_like.register()

# Releases before 4.53: their `generate` differs from their own forward for Gemma (the cache of windowed layers forgets
# tokens that are still visible) and Phi-3 (what is encoded anew is not causal), their eager attention gives every layer
# the window of some, and their OPT is refused.
IS_OLD = find_spec("transformers.masking_utils") is None
_NOT_ON_OLD = {"qwen2_window", "qwen3_biased_window", "opt", "opt_untied_without_bias"}

# Name of a case -> model type and what differs from the settings above.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 16}),
    "mistral_window": ("mistral", {**_WINDOW, "head_dim": 24}),
    "mistral_mqa": ("mistral", {"sliding_window": None, "num_key_value_heads": 1}),
    "qwen2": ("qwen2", {}),
    "qwen2_tied": ("qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "qwen2_window": ("qwen2", {**_WINDOW, "use_sliding_window": True, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 24}),
    "qwen3_biased_window": (
        "qwen3",
        {**_WINDOW, "head_dim": 32, "attention_bias": True, "use_sliding_window": True, "max_window_layers": 2},
    ),
    "phi3": ("phi3", {}),
    "phi3_mha": ("phi3", {"num_key_value_heads": 4}),
    "phi3_partial_window": ("phi3", {**_WINDOW, "partial_rotary_factor": 0.5}),
    "phi3_longrope": (
        "phi3",
        {
            "original_max_position_embeddings": 25,  # some prompts are longer, some outgrow it
            "rope_scaling": {
                "type": "longrope",
                "short_factor": [1.0 + 0.1 * i for i in range(8)],
                "long_factor": [1.0 + 0.7 * i for i in range(8)],
            },
        },
    ),
    "gemma2": ("gemma2", {**_GEMMA, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0}),
    "gemma2_uncapped_untied": (
        "gemma2",
        {**_GEMMA, "attn_logit_softcapping": None, "final_logit_softcapping": None, "tie_word_embeddings": False},
    ),
    "gemma3": ("gemma3_text", {**_GEMMA, "sliding_window_pattern": 2}),
    "gemma3_linear_rope": (
        "gemma3_text",
        {
            **_GEMMA,
            "sliding_window_pattern": 3,
            "rope_scaling": {"rope_type": "linear", "factor": 4.0},
            "rope_local_base_freq": 100.0,
            "final_logit_softcapping": 6.0,
        },
    ),
    "gpt_neox": ("gpt_neox", {**_MHA, "rotary_pct": 0.25}),
    "gpt_neox_sequential_tied": (
        "gpt_neox",
        {
            **_MHA,
            "rotary_pct": 0.5,
            "use_parallel_residual": False,
            "tie_word_embeddings": True,
            "attention_bias": False,
        },
    ),
    "opt": ("opt", {**_MHA, "ffn_dim": 80, "tie_word_embeddings": True, "word_embed_proj_dim": 64}),
    "opt_untied_without_bias": ("opt", {**_MHA, "ffn_dim": 80, "enable_bias": False, "word_embed_proj_dim": 64}),
    "mixtral": ("mixtral", {**_EXPERTS, "num_local_experts": 5, "intermediate_size": 40}),
    "mixtral_window": ("mixtral", {**_EXPERTS, **_WINDOW, "num_local_experts": 4, "tie_word_embeddings": True}),
    "qwen3_moe": ("qwen3_moe", {**_QWEN3_MOE, "norm_topk_prob": True}),
    "qwen3_moe_unnormalised": ("qwen3_moe", {**_QWEN3_MOE, "attention_bias": True, "num_experts_per_tok": 3}),
    "baichuan": ("baichuan_like", {"num_key_value_heads": 4}),
}
if IS_OLD:
    FAMILIES = {case: family for case, family in FAMILIES.items() if case not in _NOT_ON_OLD}
PROMPT_LENGTHS = (6, 20, 37, 1, 26)


def family_prompts(vocab_size: int) -> list[list[int]]:
    """Prompts that are shorter and longer than windows, blocks, steps and the original length of longrope."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, vocab_size, (length,), generator=generator).tolist() for length in PROMPT_LENGTHS]


def family_config(case: str, **changed: Any) -> PretrainedConfig:
    """The configuration of one named case; `changed` settings beat its own."""
    model_type, settings = FAMILIES[case]
    merged = {name: value for name, value in {**_BASE, **settings, **changed}.items() if value is not _ABSENT}
    return AutoConfig.for_model(model_type, **merged)


def family_model(case: str, *, seed: int = 0, **changed: Any) -> PreTrainedModel:
    """The unsharded fp32 model of one named case, by eager attention: that alone serves every feature.

    Weights are spread wide, so that greedy choices are no near-ties.
    """
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(family_config(case, **changed), attn_implementation="eager").float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
            else:
                spread = 0.5 if parameter.dim() == 1 else 0.03 if _is_scaled(name, model) else 0.2
                parameter.copy_(torch.randn_like(parameter) * spread)
    model.generation_config.eos_token_id = None
    return model


def save_family_model(case: str, folder: Path) -> PreTrainedModel:
    """Write the checkpoint of one named case and return the unsharded model."""
    model = family_model(case)
    model.save_pretrained(folder)
    return model


def greedy(model: PreTrainedModel, prompt: list[int], max_new_tokens: int) -> list[int]:
    """What Hugging Face's `generate` continues one prompt with, greedily."""
    is_inexact = IS_OLD and model.config.model_type in ("gemma2", "gemma3_text", "phi3")
    if isinstance(model, baichuan_like.BaichuanForCausalLM) or is_inexact:
        return _greedy_without_cache(model, prompt, max_new_tokens)
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=max_new_tokens, pad_token_id=0
    )
    return out[0, len(prompt) :].tolist()


def _greedy_without_cache(model: PreTrainedModel, prompt: list[int], max_new_tokens: int) -> list[int]:
    """The most likely continuation, every token from the whole sequence."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(max_new_tokens):
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def _is_scaled(name: str, model: PreTrainedModel) -> bool:
    """Embeddings that are multiplied would outweigh everything that the layers add to them."""
    return "embed_tokens" in name and model.config.model_type.startswith("gemma")
