"""ResolvedConfig: every value final, every "auto" replaced with a reason. The only configuration modules accept."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from inference_shardformer.config.inference import InferenceConfig
from inference_shardformer.config.shard import ShardConfig


@dataclass(frozen=True)
class Decision:
    """One final value: its path, the value as text, where it came from, and why."""

    path: str
    value: str
    origin: str
    reason: str


@dataclass(frozen=True)
class ResolvedConfig:
    """Final values of one engine. Hashable, never rewritten.

    `shard` and `inference` are what was asked, the fields beside them what was decided. `max_model_len` is in
    tokens. `decisions` lists every field in order of its path.
    """

    shard: ShardConfig
    inference: InferenceConfig
    tp_size: int
    device: str
    threads_per_rank: int
    dtype: str
    attention_backend: str
    max_model_len: int
    decisions: tuple[Decision, ...]

    @property
    def torch_dtype(self) -> torch.dtype:
        """The compute type as torch names it."""
        return TORCH_DTYPES[self.dtype]


TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
