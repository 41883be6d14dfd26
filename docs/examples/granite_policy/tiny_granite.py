"""Small Granite models with random weights. As a program it writes one: `python tiny_granite.py FOLDER`."""

import sys

import torch
from transformers import GraniteConfig, GraniteForCausalLM


def tiny_config(**changes: object) -> GraniteConfig:
    """A configuration with every multiplier at work; `changes` are other settings."""
    settings = {
        "vocab_size": 157,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "attention_multiplier": 0.2,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.6,
        "logits_scaling": 2.0,
        "bos_token_id": 1,
        "eos_token_id": None,
        "pad_token_id": None,
        "tie_word_embeddings": False,
    }
    return GraniteConfig(**{**settings, **changes})


if __name__ == "__main__":
    torch.manual_seed(0)
    GraniteForCausalLM(tiny_config(initializer_range=0.2)).save_pretrained(sys.argv[1])
