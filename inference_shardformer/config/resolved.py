"""ResolvedConfig: every value final, every "auto" replaced with a reason. The only configuration modules accept."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from inference_shardformer.config.inference import InferenceConfig
from inference_shardformer.config.origins import Origin
from inference_shardformer.config.shard import ShardConfig


@dataclass(frozen=True)
class Beaten:
    """A value that a level gave and a higher one overrode."""

    value: object
    origin: Origin


@dataclass(frozen=True)
class Decision:
    """One final value: its path, where it came from, why it was decided so, and what it beat, the strongest first.

    There is no reason where the value is what was asked.
    """

    path: str
    value: object
    origin: Origin
    reason: str = ""
    beaten: tuple[Beaten, ...] = ()


@dataclass(frozen=True)
class ResolvedConfig:
    """Final values of one engine. Hashable, never rewritten.

    `shard` and `inference` are what was asked, the fields beside them what was decided. `max_model_len` is in
    tokens; `num_blocks` is `None` until the engine is attached, unless it was asked for. `decisions` lists every field
    in order of its declaration, and every option of a plug-in in its place.
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
    num_blocks: int | None = None
    all_reduce: str = "none"
    block_size: int | None = None  # tokens; None where nothing decided it, then it was asked for
    graphs: int | Literal["none"] = "none"  # sequences in the largest decode step that is captured
    overlap: Literal["on", "off"] = "off"  # whether host work of a step is done while the device is at another one
    prefix_caching: Literal["on", "off"] = "off"  # whether requests share the blocks of equal prefixes
    compression: Literal["none", "lossless"] = "none"  # of the weights that the linear kernel keeps
    kernels: tuple[tuple[str, str], ...] = ()  # the kernel of each kind, by the name of its setting

    @property
    def torch_dtype(self) -> torch.dtype:
        """The compute type as torch names it."""
        return TORCH_DTYPES[self.dtype]

    def decision(self, path: str) -> Decision:
        """The decision on one full path. Raises KeyError for a path without one."""
        for decision in self.decisions:
            if decision.path == path:
                return decision
        raise KeyError(path)


def with_decision(config: ResolvedConfig, path: str, value: object, reason: str) -> ResolvedConfig:
    """`config` with one more value decided, such as `inference.cache.num_blocks` when memory is known."""
    decisions = tuple(
        replace(decision, value=value, reason=reason) if decision.path == path else decision
        for decision in config.decisions
    )
    changes = {DECIDED[path]: value} if path in DECIDED else {}
    return replace(config, decisions=decisions, **changes)  # type: ignore[arg-type]  # typed by whoever decides


CACHE_DTYPES: dict[str | None, torch.dtype | None] = {None: None, "fp8": torch.float8_e4m3fn}
"""The type that `inference.cache.dtype` asks for; `None`: the compute type."""
COMPRESSION = "inference.weights.compression"
TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DECIDED = {
    "shard.tp_size": "tp_size",
    "shard.device": "device",
    "shard.threads_per_rank": "threads_per_rank",
    "shard.all_reduce": "all_reduce",
    "inference.dtype": "dtype",
    "inference.attention.backend": "attention_backend",
    "inference.max_model_len": "max_model_len",
    "inference.cache.num_blocks": "num_blocks",
    "inference.cache.block_size": "block_size",
    "inference.graphs": "graphs",
    "inference.scheduler.overlap": "overlap",
    "inference.cache.prefix_caching": "prefix_caching",
    COMPRESSION: "compression",
}
"""The attribute of `ResolvedConfig` that holds the decided value of a field."""
