"""Which policy serves which architecture."""

from __future__ import annotations

from inference_shardformer.errors import UnsupportedModelError
from inference_shardformer.policies.base import Policy
from inference_shardformer.policies.llama import LlamaPolicy

_BUILT_IN: tuple[type[Policy], ...] = (LlamaPolicy,)


def supported_architectures() -> tuple[str, ...]:
    """Architectures that have a policy."""
    return tuple(name for policy in _BUILT_IN for name in policy.architectures)


def policy_for(architecture: str) -> Policy:
    """The policy of an architecture such as `LlamaForCausalLM`; `UnsupportedModelError` lists the known ones."""
    for policy in _BUILT_IN:
        if architecture in policy.architectures:
            return policy()
    raise UnsupportedModelError(
        f"no policy shards {architecture!r}; supported: {', '.join(supported_architectures())}",
        remedy="pass policy= with a Policy of your own, or use a supported model",
    )
