"""ModelFacts: what the rest of the product needs to know of a model, read from its configuration alone."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelFacts:
    """Facts of the unsharded model; counts are those of the whole model, not of a rank.

    `length_dependent_rope`: the rotary frequencies depend on the length of the sequence (dynamic NTK, longrope).
    """

    architecture: str
    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    total_num_heads: int
    total_num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    eos_token_ids: tuple[int, ...]
    tie_word_embeddings: bool
    checkpoint_dtype: str | None
    length_dependent_rope: bool = False
