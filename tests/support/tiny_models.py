"""Tiny LLaMA checkpoints with random weights, one for each feature that sharding can get wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

_BASE: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
_ROPE = {"rope_theta": 10000.0}
_HALF = 4  # rotary frequencies of a head: head_dim / 2

CASES: dict[str, dict[str, Any]] = {
    "mha": {"num_key_value_heads": 8},
    "gqa": {},
    "gqa_fewer_kv_heads_than_ranks": {"num_key_value_heads": 2},
    "mqa": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "biased": {"attention_bias": True, "mlp_bias": True},
    "explicit_head_dim": {"head_dim": 16},
    "odd_vocabulary": {"vocab_size": 157},
    "odd_vocabulary_tied": {"vocab_size": 153, "tie_word_embeddings": True},
    "rope_linear": {"rope_scaling": {"rope_type": "linear", "factor": 2.0, **_ROPE}},
    "rope_llama3": {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
            **_ROPE,
        }
    },
    "rope_yarn": {
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            **_ROPE,
        }
    },
    "rope_dynamic": {
        "max_position_embeddings": 32,
        "rope_scaling": {"rope_type": "dynamic", "factor": 8.0, **_ROPE},
    },
    "rope_longrope": {
        "rope_scaling": {
            "rope_type": "longrope",
            "short_factor": [1.0] * _HALF,
            "long_factor": [1.0 + 0.7 * i for i in range(_HALF)],
            "factor": 8.0,
            "original_max_position_embeddings": 32,
            **_ROPE,
        }
    },
}


def tiny_config(case: str) -> LlamaConfig:
    """The configuration of one named case, for any transformers version."""
    settings = {**_BASE, **CASES[case]}
    return LlamaConfig(**settings)


def tiny_model(case: str, *, seed: int = 0) -> LlamaForCausalLM:
    """The unsharded fp32 model of one named case. Weights are spread wide, so that greedy choices are no near-ties."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(tiny_config(case)).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(1.0 + 0.1 * torch.randn_like(parameter))
            else:
                parameter.copy_(torch.randn_like(parameter) * (0.5 if parameter.dim() == 1 else 0.2))
    model.generation_config.eos_token_id = None
    return model


def save_tiny_model(case: str, folder: Path, *, max_shard_size: str = "5GB") -> LlamaForCausalLM:
    """Write the checkpoint of one named case and return the unsharded model."""
    model = tiny_model(case)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model


def hf_greedy(model: LlamaForCausalLM, prompt: list[int], max_new_tokens: int) -> list[int]:
    """What Hugging Face's `generate` continues one prompt with, greedily.

    The rotary module is made anew: Hugging Face's dynamic rope remembers the longest sequence it ever met.
    """
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config)
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=max_new_tokens, pad_token_id=0
    )
    return out[0, len(prompt) :].tolist()


def ragged_prompts(count: int, vocab_size: int, *, longest: int = 40, seed: int = 1) -> list[list[int]]:
    """Prompts of mixed lengths, from one token up."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(0, vocab_size, (length,), generator=generator).tolist() for length in lengths]
