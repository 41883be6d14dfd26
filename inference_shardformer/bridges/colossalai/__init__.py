"""The bridge to ColossalAI: its ShardFormer with our modules and our engine, and imports that its scripts can use.

ColossalAI itself is imported when `ColossalInferenceShardformer` or a policy is asked for, not before.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

_HERE = "inference_shardformer.bridges.colossalai"
_EXPORTS = {
    "ColossalInferenceShardformer": f"{_HERE}.shardformer",
    "InferenceConfig": f"{_HERE}.config",
    "InferenceEngine": f"{_HERE}.engine",
    "InferencePolicy": f"{_HERE}.policies",
    "LlamaInferencePolicy": f"{_HERE}.policies",
    "launch_from_torch": f"{_HERE}.launching",
}
__all__ = [
    "ColossalInferenceShardformer",
    "InferenceConfig",
    "InferenceEngine",
    "InferencePolicy",
    "LlamaInferencePolicy",
    "launch_from_torch",
]

if TYPE_CHECKING:
    from inference_shardformer.bridges.colossalai.config import InferenceConfig
    from inference_shardformer.bridges.colossalai.engine import InferenceEngine
    from inference_shardformer.bridges.colossalai.launching import launch_from_torch
    from inference_shardformer.bridges.colossalai.policies import InferencePolicy, LlamaInferencePolicy
    from inference_shardformer.bridges.colossalai.shardformer import ColossalInferenceShardformer


def __getattr__(name: str) -> object:
    """Import public names on first use."""
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)
