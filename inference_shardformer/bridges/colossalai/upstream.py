"""What the bridge takes from ColossalAI: the one place that imports it. `inference_shardformer.bridges` alone may."""

from __future__ import annotations

from inference_shardformer.bridges.colossalai.installing import missing_colossalai
from inference_shardformer.bridges.colossalai.mending import unchanged_environment

with unchanged_environment():
    try:
        from colossalai.accelerator.cpu_accelerator import CpuAccelerator
        from colossalai.shardformer import ModelSharder, ShardConfig, ShardFormer
        from colossalai.shardformer.policies.base_policy import (
            ModulePolicyDescription,
            Policy,
            SubModuleReplacementDescription,
        )
    except ImportError as exc:
        raise missing_colossalai(exc) from exc
    try:
        from colossalai.shardformer.policies.llama import LlamaForCausalLMPolicy
    except ImportError:  # it follows transformers 4.51.3: later ones lack StaticCache in modeling_llama
        LlamaForCausalLMPolicy = Policy

__all__ = [
    "CpuAccelerator",
    "LlamaForCausalLMPolicy",
    "ModelSharder",
    "ModulePolicyDescription",
    "Policy",
    "ShardConfig",
    "ShardFormer",
    "SubModuleReplacementDescription",
]
