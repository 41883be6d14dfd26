"""ModelFacts: what the rest of the product needs to know of a model, read from its configuration alone."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelFacts:
    """Facts of the unsharded model; counts are those of the whole model, not of a rank.

    `length_dependent_rope`: the rotary frequencies depend on the length of the sequence (dynamic NTK, longrope). With a
    `rope_switch_length`, a sequence that grows beyond it is encoded anew with the frequencies of long ones.

    `sliding_windows` are the tokens that a query of each layer sees, itself included, `None` for all of them; empty
    where no layer has a window. `attention_scale` multiplies the scores; `None` stands for `head_dim ** -0.5`.
    `attention_softcap` squashes them; `None` leaves them alone. `attention_sinks`: each layer brings a logit per head.
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
    activation: str = ""  # of the gated MLP, by Hugging Face's name; empty where there is none
    length_dependent_rope: bool = False
    rope_switch_length: int | None = None
    sliding_windows: tuple[int | None, ...] = ()  # [num_layers], or empty
    attention_scale: float | None = None
    attention_softcap: float | None = None
    attention_sinks: bool = False
