"""The attention backends of one rank: the spec they are judged by, the verdicts, and the proof of the winner."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import fields, replace
from functools import cache, partial
from typing import NamedTuple

import torch

from inference_shardformer.attention.base import AttentionBackend, AttentionSpec
from inference_shardformer.attention.block_size import USUAL_BLOCK_SIZE, choose_block_size
from inference_shardformer.attention.groups import LayerGroups
from inference_shardformer.attention.selector import Selection, Verdict, build, judge
from inference_shardformer.attention.survey import BACKENDS, BackendRegistry, Survey, make_survey
from inference_shardformer.config.loader import MergedConfig, merge_layers
from inference_shardformer.config.resolved import CACHE_DTYPES, TORCH_DTYPES
from inference_shardformer.config.sources import Layers
from inference_shardformer.doctor.report import AttentionReport, BackendReport, ProofReport, ReasonReport
from inference_shardformer.errors import InferenceShardformerError
from inference_shardformer.huggingface import read_model
from inference_shardformer.policies.registry import policy_for
from inference_shardformer.resolving.examination import layer_groups
from inference_shardformer.resolving.options import bind_policy, chosen_options
from inference_shardformer.resolving.presets import with_preset
from inference_shardformer.sharding.plan import RankLayout
from inference_shardformer.tuning.selecting import select_backend

# A common LLaMA of eight billion parameters.
_LAYERS, _HEADS, _KV_HEADS, _HEAD_DIM = 32, 32, 8, 128


class Wanted(NamedTuple):
    """What the backends are to serve: the specs of the layers, the settings, and what is described, in words."""

    of: str
    groups: LayerGroups
    merged: MergedConfig


def wanted_by_model(model: str, layers: Layers, layout: RankLayout, device: torch.device) -> Wanted:
    """The specs of one rank of a model. Raises what is wrong with the model, or with its split over the ranks."""
    trust = merge_layers(layers).inference.weights.trust_remote_code
    source = read_model(model, None, trust_remote_code=trust)
    policy = bind_policy(policy_for(source.architecture), merge_layers(layers))
    facts = policy.facts(source.hf_config)
    policy.check_tp_size(facts, layout.tp_size)
    merged = merge_layers(with_preset(layers, policy, facts))
    groups = layer_groups(policy, facts, merged, layout, device, cache(partial(make_survey, device)))
    return Wanted(f"{model} ({facts.architecture}) on {_ranks(layout.tp_size)}", groups, merged)


def wanted_usually(layers: Layers, layout: RankLayout, device: torch.device) -> Wanted:
    """A representative spec: a LLaMA of eight billion parameters, in bf16 unless another type was asked for."""
    merged = merge_layers(layers)
    name = "bf16" if merged.inference.dtype == "auto" else merged.inference.dtype
    kv_heads = max(1, _KV_HEADS // layout.tp_size)
    usual = AttentionSpec(
        num_heads=kv_heads * (_HEADS // _KV_HEADS),
        num_kv_heads=kv_heads,
        head_dim=_HEAD_DIM,
        scale=_HEAD_DIM**-0.5,
        dtype=TORCH_DTYPES[name],
        device=device,
        block_size=USUAL_BLOCK_SIZE,
        kv_dtype=CACHE_DTYPES[merged.inference.cache.dtype],
    )

    def groups_of(block_size: int) -> LayerGroups:
        return LayerGroups.of([replace(usual, block_size=block_size)] * _LAYERS)

    asked = merged.inference.cache.block_size
    if asked == "auto":
        asked = choose_block_size(merged.inference.attention.backend, groups_of, make_survey(device))
    of = f"a LLaMA of 8 billion parameters on {_ranks(layout.tp_size)} (--model names yours)"
    return Wanted(of, groups_of(asked), merged)


def examine_attention(wanted: Wanted, registry: BackendRegistry = BACKENDS) -> tuple[AttentionReport, ...]:
    """For each group of layers, judge every candidate, select as an engine would, and let the winner prove itself.

    Raises nothing of its own.
    """
    survey = make_survey(wanted.groups.specs[0].device, registry)
    return tuple(_examine(wanted, group, survey, registry) for group in range(len(wanted.groups.specs)))


def _examine(wanted: Wanted, group: int, survey: Survey, registry: BackendRegistry) -> AttentionReport:
    attention, spec = wanted.merged.inference.attention, wanted.groups.specs[group]
    selection: Selection | None = None
    try:
        selection = select_backend(spec, attention, survey)
        proof = _prove(selection, spec, wanted.merged, registry)
    except InferenceShardformerError as exc:
        proof = ProofReport("not run", exc.message, exc.remedy)
    chosen = selection.name if selection else None
    is_alone = len(wanted.groups.specs) == 1
    of = wanted.of if is_alone else f"{wanted.groups.named(group)} of {wanted.of}"
    return AttentionReport(of, described(spec), attention.backend, _backends(judge(spec, survey), chosen), proof)


def described(spec: AttentionSpec) -> dict[str, str]:
    """A spec as text; what it does not ask for is left out."""
    shown = {each.name: getattr(spec, each.name) for each in fields(spec) if each.name not in ("features", "scale")}
    return {name: str(value).removeprefix("torch.") for name, value in shown.items() if value not in (None, False)}


def _prove(selection: Selection, spec: AttentionSpec, merged: MergedConfig, registry: BackendRegistry) -> ProofReport:
    began = time.perf_counter()
    try:
        options = chosen_options(merged, selection.name, registry).typed
        backend: AttentionBackend = build(selection, spec, registry, options=options)
    except InferenceShardformerError as exc:
        return ProofReport("failed", exc.message, exc.remedy)
    seconds = time.perf_counter() - began
    return ProofReport("passed", f"{backend.name} gave what the reference gives at these shapes", "", seconds)


def _backends(verdicts: Sequence[Verdict], chosen: str | None) -> tuple[BackendReport, ...]:
    return tuple(
        BackendReport(
            verdict.name,
            verdict.origin,
            "refused" if verdict.reasons else "chosen" if verdict.name == chosen else "could serve",
            tuple(ReasonReport(*reason) for reason in verdict.reasons),
        )
        for verdict in verdicts
    )


def _ranks(number: int) -> str:
    return "1 rank" if number == 1 else f"{number} ranks"
