"""Decoder families of Hugging Face that have no policy here, each by what its default configuration lacks.

Run as a script it drafts them all and prints what became of each one.
"""

from __future__ import annotations

import sys
from typing import Any

import transformers
from transformers import PretrainedConfig

from inference_shardformer.drafting.draft import Draft, draft_policy

FAMILIES: dict[str, dict[str, Any]] = {
    "OlmoForCausalLM": {},
    "Olmo2ForCausalLM": {},
    "Olmo3ForCausalLM": {},
    "FlexOlmoForCausalLM": {},
    "GraniteForCausalLM": {},
    "GraniteMoeForCausalLM": {},
    "CohereForCausalLM": {},
    "Cohere2ForCausalLM": {},
    "StableLmForCausalLM": {},
    "Starcoder2ForCausalLM": {},
    "PhiForCausalLM": {},
    "PersimmonForCausalLM": {},
    "NemotronForCausalLM": {"num_key_value_heads": 8},
    "GlmForCausalLM": {},
    "Glm4ForCausalLM": {},
    "HeliumForCausalLM": {},
    "SmolLM3ForCausalLM": {},
    "Ernie4_5ForCausalLM": {},
    "Exaone4ForCausalLM": {},
    "ArceeForCausalLM": {},
    "HunYuanDenseV1ForCausalLM": {"head_dim": 128, "num_key_value_heads": 8},
    "SeedOssForCausalLM": {},
    "MinistralForCausalLM": {"head_dim": 128},
    "Ministral3ForCausalLM": {},
    "GemmaForCausalLM": {},
    "VaultGemmaForCausalLM": {},
    "BioGptForCausalLM": {},
    "CwmForCausalLM": {},
    "Jais2ForCausalLM": {},
    "Qwen2MoeForCausalLM": {},
    "Lfm2ForCausalLM": {},
    "ApertusForCausalLM": {},
    "GptOssForCausalLM": {},
    "BitNetForCausalLM": {},
    "BloomForCausalLM": {},
    "FalconForCausalLM": {},
    "GPTJForCausalLM": {},
    "MptForCausalLM": {},
}


def family_config(architecture: str) -> PretrainedConfig | None:
    """The default configuration with four layers; `None` where the installed transformers lacks the family."""
    model_class = getattr(transformers, architecture, None)
    if model_class is None:
        return None
    config = model_class.config_class(**FAMILIES[architecture])
    config.architectures = [architecture]
    config.num_hidden_layers = min(4, config.num_hidden_layers)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:4]
    return config


def outcome(draft: Draft) -> str:
    """What became of a draft, in one line."""
    if draft.is_verified:
        return "verified"
    if draft.table.undecided:
        return f"undecided: {draft.table.undecided[0]}"
    first = draft.reports[-1].first
    return f"refuted: {first.module if first else ''}: {first.message.splitlines()[0] if first else ''}"


def main() -> None:
    """Draft every family."""
    outcomes = {name: outcome(draft_policy(config)) for name in FAMILIES if (config := family_config(name))}
    for name, told in outcomes.items():
        print(f"{name:<28} {told}", flush=True)
    print(f"{sum(told == 'verified' for told in outcomes.values())} of {len(outcomes)} verified")


if __name__ == "__main__":
    sys.exit(main())
