"""Model shapes, checkpoints with random weights, and requests."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

SHAPES: dict[str, dict[str, object]] = {
    "tiny": {
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    },
    "135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    "1.1b": {
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    },
}
_COMMON = {"max_position_embeddings": 2048, "eos_token_id": None, "pad_token_id": 0}


@dataclass(frozen=True)
class Workload:
    """Requests: token ids, and how many tokens each must generate."""

    prompts: list[list[int]]
    max_new_tokens: list[int]

    @property
    def generated(self) -> int:
        """Tokens that every side must generate."""
        return sum(self.max_new_tokens)


def write_checkpoint(folder: Path, shape: str, dtype: torch.dtype) -> None:
    """A LLaMA of a known shape with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPES[shape], **_COMMON)).to(dtype).save_pretrained(folder)


def single(prompt_length: int, new_tokens: int, *, vocab_size: int, seed: int = 1) -> Workload:
    """One request."""
    generator = torch.Generator().manual_seed(seed)
    return Workload([torch.randint(0, vocab_size, (prompt_length,), generator=generator).tolist()], [new_tokens])


def ragged(count: int, *, vocab_size: int, seed: int = 1) -> Workload:
    """`count` requests with prompts of 8 to 256 tokens and 8 to 64 tokens to generate, all lengths log-uniform."""
    generator = torch.Generator().manual_seed(seed)
    prompts, lengths = [], []
    for draw in torch.rand((count, 2), generator=generator).tolist():
        length = round(8 * (256 / 8) ** draw[0])
        prompts.append(torch.randint(0, vocab_size, (length,), generator=generator).tolist())
        lengths.append(round(8 * (64 / 8) ** draw[1]))
    return Workload(prompts, lengths)
