"""Mixtral: Mistral with a mixture of experts in every layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from inference_shardformer.policies.base import PolicyEntry
from inference_shardformer.policies.moe import MoEPolicy
from inference_shardformer.policies.windows import SlidingWindows, same_window_everywhere

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_STORED_BLOCK = "block_sparse_moe"  # what checkpoints call the mixture, whatever the model does


class MixtralPolicy(MoEPolicy):
    """Shards `MixtralForCausalLM`."""

    architectures: ClassVar[tuple[str, ...]] = ("MixtralForCausalLM",)
    family: ClassVar[str] = "Mixtral"
    projections: ClassVar[tuple[str, str, str]] = ("w1", "w3", "w2")

    def sliding_windows(self, hf_config: PreTrainedConfig) -> SlidingWindows:
        """`sliding_window` tokens in every layer, or none."""
        return same_window_everywhere(hf_config)

    def normalises(self, hf_config: PreTrainedConfig) -> bool:
        """Always."""
        return True

    def mlp_rows(self, path: str) -> tuple[PolicyEntry, ...]:
        """The mixture stands where the installed transformers puts it."""
        return super().mlp_rows(f"{path.rpartition('.')[0]}.{_block()}")

    def stored_name(self, name: str) -> str:
        """Checkpoints keep the name that the mixture had in transformers 4."""
        return name.replace(f".{_block()}.", f".{_STORED_BLOCK}.")


def _block() -> str:
    from transformers.models.mixtral import modeling_mixtral

    return "mlp" if hasattr(modeling_mixtral, "MixtralExperts") else _STORED_BLOCK
