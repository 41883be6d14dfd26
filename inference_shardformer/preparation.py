"""Everything that is decided before a weight is read: facts, sizes, values, and a backend that has proven itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from inference_shardformer.attention.base import AttentionBackend
from inference_shardformer.attention.selector import Selection, build, select
from inference_shardformer.config.inference import InferenceConfig
from inference_shardformer.config.model import ModelFacts
from inference_shardformer.config.origins import Origin
from inference_shardformer.config.resolved import TORCH_DTYPES, ResolvedConfig
from inference_shardformer.config.shard import ShardConfig
from inference_shardformer.policies.base import Policy
from inference_shardformer.policies.facts import token_ids
from inference_shardformer.policies.registry import policy_for
from inference_shardformer.resolution import Decided, HostFacts, resolve, resolve_dtype
from inference_shardformer.sharding.plan import RankLayout

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from inference_shardformer.ranks import Ranks


Eos = int | list[int] | None


@dataclass(frozen=True)
class Asked:
    """What the user gave: both configurations, and the origin of every value that is not a default."""

    shard: ShardConfig
    inference: InferenceConfig
    provenance: Mapping[str, Origin]


@dataclass(frozen=True)
class Prepared:
    """What is known before weights are read. `backend` has passed its proof on this rank."""

    policy: Policy
    facts: ModelFacts
    hf_config: PreTrainedConfig
    config: ResolvedConfig
    selection: Selection
    backend: AttentionBackend


def prepare(
    asked: Asked, ranks: Ranks, hf_config: PreTrainedConfig, architecture: str, eos: Eos, policy: Policy | None
) -> Prepared:
    """Read facts, check sizes, resolve values, select a backend and let it prove itself."""
    policy = policy or policy_for(architecture)
    facts = replace(policy.facts(hf_config), eos_token_ids=token_ids(eos))
    layout = RankLayout(ranks.group.size, ranks.group.rank)
    policy.check_tp_size(facts, layout.tp_size)
    dtype = resolve_dtype(asked.inference, facts)
    spec = policy.attention_spec(
        facts,
        layout,
        dtype=TORCH_DTYPES[dtype.value],
        device=ranks.device,
        block_size=asked.inference.cache.block_size,
    )
    selection = select(spec, asked.inference.attention.backend)
    config = resolve(
        asked.shard,
        asked.inference,
        facts=facts,
        host=HostFacts(layout.tp_size, ranks.ranks_on_host, ranks.device.type, ranks.device_reason),
        provenance=asked.provenance,
        dtype=dtype,
        attention_backend=Decided(selection.name, "the first candidate without a reason against it"),
    )
    return Prepared(policy, facts, hf_config, config, selection, build(selection, spec))


def agreed_facts(prepared: Prepared) -> dict[str, str]:
    """What must be equal on every rank before any of them goes on."""
    return {
        "model": repr(prepared.facts),
        "policy": f"{type(prepared.policy).__module__}.{type(prepared.policy).__qualname__}",
        "torch": torch.__version__,
        **{decision.path: decision.value for decision in prepared.config.decisions},
    }
