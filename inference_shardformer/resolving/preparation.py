"""Everything that is decided before a weight is read: facts, sizes, values, and a backend that has proven itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from inference_shardformer.attention.layered import LayeredAttention
from inference_shardformer.attention.selecting import build_each
from inference_shardformer.attention.selector import Selection
from inference_shardformer.attention.verdicts import LayerVerdicts, from_bytes, to_bytes, verdicts_of
from inference_shardformer.compute.bound import ComputeKernels, build_kernels
from inference_shardformer.config.effects import ConfigEvent
from inference_shardformer.config.model import ModelFacts
from inference_shardformer.config.resolved import COMPRESSION, ResolvedConfig
from inference_shardformer.config.sources import Layers
from inference_shardformer.distributed.all_reduce import AllReduceChoice
from inference_shardformer.policies.base import Policy
from inference_shardformer.resolving.examination import ModelSource, examine
from inference_shardformer.resolving.kernels import ChosenKernels
from inference_shardformer.resolving.resolution import HostFacts

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from inference_shardformer.ranks import Ranks


@dataclass(frozen=True)
class Prepared:
    """What is known before weights are read. Backends and kernels have passed their proofs on this rank.

    `selections` has one for each group of layers, `rank_verdicts` what every rank says of its own.
    """

    policy: Policy
    facts: ModelFacts
    hf_config: PreTrainedConfig
    config: ResolvedConfig
    selections: tuple[Selection, ...]
    attention: LayeredAttention
    chosen_kernels: ChosenKernels
    kernels: ComputeKernels
    all_reduce: AllReduceChoice
    events: tuple[ConfigEvent, ...] = ()
    rank_verdicts: tuple[tuple[LayerVerdicts, ...], ...] = ()


def prepare(layers: Layers, ranks: Ranks, read_model: Callable[[], ModelSource]) -> Prepared:
    """Read facts, check everything, resolve values, select a backend for every layer and let each prove itself."""
    sums = ranks.group.all_reduce_choice
    host = HostFacts(ranks.group.size, ranks.ranks_on_host, ranks.device.type, ranks.device_reason, sums)
    seen = examine(layers, read_model, host, device=ranks.device, tp_rank=ranks.group.rank)
    return Prepared(
        policy=seen.policy,
        facts=seen.facts,
        hf_config=seen.hf_config,
        config=seen.config,
        selections=seen.selections,
        attention=build_each(seen.groups, seen.selections, options=seen.options),
        chosen_kernels=seen.kernels,
        kernels=build_kernels(seen.kernels.selections, seen.kernels.spec),
        all_reduce=sums,
        events=seen.events,
    )


def agreed_facts(prepared: Prepared) -> dict[str, str]:
    """What must be equal on every rank before any of them goes on."""
    groups = prepared.attention.groups
    return {
        "model": repr(prepared.facts),
        "policy": f"{type(prepared.policy).__module__}.{type(prepared.policy).__qualname__}",
        "policy adapters": prepared.policy.adapters.describe(),
        "torch": torch.__version__,
        "attention backends": prepared.selections[0].candidates(),  # the same ones for every layer
        "attention of layers": "; ".join(
            f"{groups.named(group)}: {selection.name}" for group, selection in enumerate(prepared.selections)
        ),
        **{decision.path: str(decision.value) for decision in prepared.config.decisions},
        **_settings_of_model(prepared.hf_config),
        COMPRESSION: prepared.config.inference.weights.compression,  # what was asked: bits are the same either way
    }


def _settings_of_model(hf_config: PreTrainedConfig) -> dict[str, str]:
    """What config.json says, facts or not: with another epsilon or rotary base a rank computes, but nonsense."""
    own = {name: value for name, value in hf_config.to_dict().items() if not name.startswith("_")}
    own.pop("transformers_version", None)  # what wrote it
    return {
        f"config.json {name}": json.dumps(value, skipkeys=True, default=lambda each: type(each).__name__)
        for name, value in own.items()
    }


def with_rank_verdicts(prepared: Prepared, ranks: Ranks) -> Prepared:
    """`prepared` with the verdicts of every rank; all of them must be here at the same time."""
    mine = to_bytes(verdicts_of(prepared.attention.groups, prepared.selections))
    everyone = ranks.group.all_gather_bytes(mine)
    return replace(prepared, rank_verdicts=tuple(map(from_bytes, everyone)))
