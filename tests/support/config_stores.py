"""A resolved configuration for tests of the live store, the names of its live fields, and calls on other threads."""

from __future__ import annotations

import threading
from typing import Any

from inference_shardformer.config.fields import all_fields
from inference_shardformer.config.inference import InferenceConfig
from inference_shardformer.config.origins import DEFAULT
from inference_shardformer.config.resolved import Decision, ResolvedConfig
from inference_shardformer.config.shard import ShardConfig

SEQS = "inference.scheduler.max_num_seqs"
TOKENS = "inference.scheduler.max_num_batched_tokens"
TOP_K = "inference.sampling.top_k"
TOP_P = "inference.sampling.top_p"
TEMPERATURE = "inference.sampling.temperature"
LENGTH = "inference.sampling.max_new_tokens"
DECIDED = {
    "shard.tp_size": ("tp_size", 2),
    "shard.device": ("device", "cpu"),
    "shard.threads_per_rank": ("threads_per_rank", 3),
    "shard.all_reduce": ("all_reduce", "shm"),
    "inference.dtype": ("dtype", "bf16"),
    "inference.max_model_len": ("max_model_len", 128),
    "inference.attention.backend": ("attention_backend", "sdpa"),
    "inference.cache.num_blocks": ("num_blocks", 77),
    "inference.cache.block_size": ("block_size", 32),
    "inference.graphs": ("graphs", 24),
    "inference.scheduler.overlap": ("overlap", "on"),
    "inference.cache.prefix_caching": ("prefix_caching", "on"),
    "inference.weights.compression": ("compression", "lossless"),
}


def resolved(inference: InferenceConfig | None = None) -> ResolvedConfig:
    return ResolvedConfig(
        shard=ShardConfig(),
        inference=inference or InferenceConfig(),
        decisions=tuple(Decision(path, "as asked", DEFAULT, "because") for path in all_fields()),
        **dict(DECIDED.values()),
    )


class Boom(Exception):
    """What a broken callback raises."""


def in_thread(work) -> list[Any]:
    """Run `work` on another thread; what it returned or raised. Fails rather than hangs."""
    result: list[Any] = []

    def run() -> None:
        try:
            result.append(work())
        except Exception as exc:  # noqa: BLE001 - handed to the test
            result.append(exc)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive(), "deadlock"
    return result
