"""Everything that is decided before a weight is read: facts, sizes, values, and a backend that has proven itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from inference_shardformer.attention.base import AttentionBackend
from inference_shardformer.attention.selector import Selection, build
from inference_shardformer.config.effects import ConfigEvent
from inference_shardformer.config.model import ModelFacts
from inference_shardformer.config.resolved import ResolvedConfig
from inference_shardformer.config.sources import Layers
from inference_shardformer.policies.base import Policy
from inference_shardformer.resolving.examination import ModelSource, examine
from inference_shardformer.resolving.resolution import HostFacts

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from inference_shardformer.ranks import Ranks


@dataclass(frozen=True)
class Prepared:
    """What is known before weights are read. `backend` has passed its proof on this rank."""

    policy: Policy
    facts: ModelFacts
    hf_config: PreTrainedConfig
    config: ResolvedConfig
    selection: Selection
    backend: AttentionBackend
    events: tuple[ConfigEvent, ...] = ()


def prepare(layers: Layers, ranks: Ranks, read_model: Callable[[], ModelSource]) -> Prepared:
    """Read facts, check everything, resolve values, select a backend and let it prove itself."""
    host = HostFacts(ranks.group.size, ranks.ranks_on_host, ranks.device.type, ranks.device_reason)
    seen = examine(layers, read_model, host, device=ranks.device, tp_rank=ranks.group.rank)
    backend = build(seen.selection, seen.spec, options=seen.options.typed)
    return Prepared(seen.policy, seen.facts, seen.hf_config, seen.config, seen.selection, backend, seen.events)


def agreed_facts(prepared: Prepared) -> dict[str, str]:
    """What must be equal on every rank before any of them goes on."""
    return {
        "model": repr(prepared.facts),
        "policy": f"{type(prepared.policy).__module__}.{type(prepared.policy).__qualname__}",
        "policy adapters": prepared.policy.adapters.describe(),
        "torch": torch.__version__,
        "attention backends": prepared.selection.candidates(),
        **{decision.path: str(decision.value) for decision in prepared.config.decisions},
    }
