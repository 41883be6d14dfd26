"""Inference Shardformer: shards a Hugging Face decoder across ranks and generates with it, explaining every choice."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_EXPORTS = {
    "ConfigSources": "inference_shardformer.config.sources",
    "InferenceConfig": "inference_shardformer.config.inference",
    "InferenceEngine": "inference_shardformer.engine.engine",
    "InferenceShardformer": "inference_shardformer.shardformer",
    "InferenceShardformerError": "inference_shardformer.errors",
    "RequestOutput": "inference_shardformer.engine.outputs",
    "SamplingParams": "inference_shardformer.engine.sampling_params",
    "ShardConfig": "inference_shardformer.config.shard",
    "explain": "inference_shardformer.explaining.offline",
}
__all__ = [
    "ConfigSources",
    "InferenceConfig",
    "InferenceEngine",
    "InferenceShardformer",
    "InferenceShardformerError",
    "RequestOutput",
    "SamplingParams",
    "ShardConfig",
    "__version__",
    "explain",
]

if TYPE_CHECKING:
    from inference_shardformer.config.inference import InferenceConfig
    from inference_shardformer.config.shard import ShardConfig
    from inference_shardformer.config.sources import ConfigSources
    from inference_shardformer.engine.engine import InferenceEngine
    from inference_shardformer.engine.outputs import RequestOutput
    from inference_shardformer.engine.sampling_params import SamplingParams
    from inference_shardformer.errors import InferenceShardformerError
    from inference_shardformer.explaining.offline import explain
    from inference_shardformer.shardformer import InferenceShardformer


def __getattr__(name: str) -> object:
    """Import public names on first use, so that `import inference_shardformer` costs nothing."""
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)
