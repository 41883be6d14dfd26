"""Qwen3-MoE: Qwen3 with a mixture of experts in every layer."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar

from torch import nn

from inference_shardformer.modeling.nopadding_layer import NoPaddingPlainLayer
from inference_shardformer.policies.base import BuildContext, PolicyEntry
from inference_shardformer.policies.moe import MoEPolicy
from inference_shardformer.policies.rows import replace

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class Qwen3MoePolicy(MoEPolicy):
    """Shards `Qwen3MoeForCausalLM` whose layers are all sparse.

    Windows are refused: releases of transformers disagree on which of its layers have them.
    """

    architectures: ClassVar[tuple[str, ...]] = ("Qwen3MoeForCausalLM",)
    family: ClassVar[str] = "Qwen3Moe"
    head_norms: ClassVar[tuple[str, ...]] = ("q_norm", "k_norm")
    projections: ClassVar[tuple[str, str, str]] = ("gate_proj", "up_proj", "down_proj")
    intermediate_size: ClassVar[str] = "moe_intermediate_size"
    served: ClassVar[Mapping[str, object]] = MappingProxyType(
        {
            "use_sliding_window": False,
            "mlp_only_layers": None,
            "decoder_sparse_step": 1,
            "output_router_logits": False,
        }
    )
    layer_expects_logits: ClassVar[bool] = False  # it is ours

    def sliding_windows(self, hf_config: PreTrainedConfig) -> tuple[int | None, ...]:
        """None, since `use_sliding_window` is refused."""
        return ()

    def normalises(self, hf_config: PreTrainedConfig) -> bool:
        """As `norm_topk_prob` says."""
        return bool(hf_config.norm_topk_prob)

    def layer_rows(self, path: str) -> tuple[PolicyEntry, ...]:
        """In transformers 4 the layer does not hand the packed batch on."""
        return (replace(path, native_class="Qwen3MoeDecoderLayer", build=_layer),) if _is_one_by_one() else ()


def _is_one_by_one() -> bool:
    """Whether the installed transformers still has modules for single experts."""
    from transformers.models.qwen3_moe import modeling_qwen3_moe

    return not hasattr(modeling_qwen3_moe, "Qwen3MoeExperts")


def _layer(native: nn.Module, children: Mapping[str, nn.Module], context: BuildContext) -> nn.Module:
    return NoPaddingPlainLayer(**children)
