"""Inference Shardformer: shards a Hugging Face decoder across ranks and generates with it, explaining every choice."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from inference_shardformer.importing import collection_paused

__version__ = "0.1.0"

_EXPORTS = {
    "AsyncEngine": "inference_shardformer.engine.async_engine",
    "ConfigSources": "inference_shardformer.config.sources",
    "InferenceConfig": "inference_shardformer.config.inference",
    "InferenceEngine": "inference_shardformer.engine.engine",
    "InferenceShardformer": "inference_shardformer.shardformer",
    "InferenceShardformerError": "inference_shardformer.errors",
    "RequestOutput": "inference_shardformer.engine.outputs",
    "SamplingParams": "inference_shardformer.engine.sampling_params",
    "ShardConfig": "inference_shardformer.config.shard",
    "derive_policy": "inference_shardformer.drafting.draft",
    "draft_policy": "inference_shardformer.drafting.draft",
    "explain": "inference_shardformer.explaining.offline",
    "plan_model": "inference_shardformer.planning.offline",
    "simulate": "inference_shardformer.simulation",
    "verify_sharding": "inference_shardformer.verification.verify",
}
__all__ = [
    "AsyncEngine",
    "ConfigSources",
    "InferenceConfig",
    "InferenceEngine",
    "InferenceShardformer",
    "InferenceShardformerError",
    "RequestOutput",
    "SamplingParams",
    "ShardConfig",
    "__version__",
    "derive_policy",
    "draft_policy",
    "explain",
    "plan_model",
    "simulate",
    "verify_sharding",
]

if TYPE_CHECKING:
    from inference_shardformer.config.inference import InferenceConfig
    from inference_shardformer.config.shard import ShardConfig
    from inference_shardformer.config.sources import ConfigSources
    from inference_shardformer.drafting.draft import derive_policy, draft_policy
    from inference_shardformer.engine.async_engine import AsyncEngine
    from inference_shardformer.engine.engine import InferenceEngine
    from inference_shardformer.engine.outputs import RequestOutput
    from inference_shardformer.engine.sampling_params import SamplingParams
    from inference_shardformer.errors import InferenceShardformerError
    from inference_shardformer.explaining.offline import explain
    from inference_shardformer.planning.offline import plan_model
    from inference_shardformer.shardformer import InferenceShardformer
    from inference_shardformer.simulation import simulate
    from inference_shardformer.verification.verify import verify_sharding


def __getattr__(name: str) -> object:
    """Import public names on first use, so that `import inference_shardformer` costs nothing."""
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with collection_paused():
        return getattr(import_module(_EXPORTS[name]), name)
