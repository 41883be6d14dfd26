"""The attention backends of one rank: the spec they are judged by, the verdicts, and the proof of the winner."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import fields
from typing import NamedTuple

import torch

from inference_shardformer.attention.base import AttentionBackend, AttentionSpec
from inference_shardformer.attention.selector import Selection, Verdict, build, judge
from inference_shardformer.attention.survey import BACKENDS, BackendRegistry, make_survey
from inference_shardformer.config.loader import MergedConfig, merge_layers
from inference_shardformer.config.resolved import TORCH_DTYPES
from inference_shardformer.config.sources import Layers
from inference_shardformer.doctor.report import AttentionReport, BackendReport, ProofReport, ReasonReport
from inference_shardformer.errors import InferenceShardformerError
from inference_shardformer.huggingface import read_model
from inference_shardformer.policies.registry import policy_for
from inference_shardformer.resolving.options import chosen_options
from inference_shardformer.resolving.presets import with_preset
from inference_shardformer.resolving.resolution import resolve_dtype
from inference_shardformer.sharding.plan import RankLayout
from inference_shardformer.tuning.selecting import select_backend

# Heads of a common LLaMA of eight billion parameters.
_HEADS, _KV_HEADS, _HEAD_DIM = 32, 8, 128


class Wanted(NamedTuple):
    """What the backends are to serve: the spec, the settings, and what the spec describes, in words."""

    of: str
    spec: AttentionSpec
    merged: MergedConfig


def wanted_by_model(model: str, layers: Layers, layout: RankLayout, device: torch.device) -> Wanted:
    """The spec of one rank of a model. Raises what is wrong with the model, or with its split over the ranks."""
    trust = merge_layers(layers).inference.weights.trust_remote_code
    source = read_model(model, None, trust_remote_code=trust)
    policy = policy_for(source.architecture)
    facts = policy.facts(source.hf_config)
    policy.check_tp_size(facts, layout.tp_size)
    merged = merge_layers(with_preset(layers, policy, facts))
    dtype = TORCH_DTYPES[resolve_dtype(merged.inference, facts).value]
    block_size = merged.inference.cache.block_size
    spec = policy.attention_spec(facts, layout, dtype=dtype, device=device, block_size=block_size)
    return Wanted(f"{model} ({facts.architecture}) on {_ranks(layout.tp_size)}", spec, merged)


def wanted_usually(layers: Layers, layout: RankLayout, device: torch.device) -> Wanted:
    """A representative spec: a LLaMA of eight billion parameters, in bf16 unless another type was asked for."""
    merged = merge_layers(layers)
    name = "bf16" if merged.inference.dtype == "auto" else merged.inference.dtype
    kv_heads = max(1, _KV_HEADS // layout.tp_size)
    spec = AttentionSpec(
        num_heads=kv_heads * (_HEADS // _KV_HEADS),
        num_kv_heads=kv_heads,
        head_dim=_HEAD_DIM,
        scale=_HEAD_DIM**-0.5,
        dtype=TORCH_DTYPES[name],
        device=device,
        block_size=merged.inference.cache.block_size,
    )
    return Wanted(f"a LLaMA of 8 billion parameters on {_ranks(layout.tp_size)} (--model names yours)", spec, merged)


def examine_attention(wanted: Wanted, registry: BackendRegistry = BACKENDS) -> AttentionReport:
    """Judge every candidate, select as an engine would, and let the winner prove itself. Raises nothing of its own."""
    requested = wanted.merged.inference.attention.backend
    survey = make_survey(wanted.spec.device, registry)
    selection: Selection | None = None
    try:
        selection = select_backend(wanted.spec, wanted.merged.inference.attention, survey)
        proof = _prove(selection, wanted, registry)
    except InferenceShardformerError as exc:
        proof = ProofReport("not run", exc.message, exc.remedy)
    verdicts = judge(wanted.spec, survey)
    chosen = selection.name if selection else None
    return AttentionReport(wanted.of, described(wanted.spec), requested, _backends(verdicts, chosen), proof)


def described(spec: AttentionSpec) -> dict[str, str]:
    """A spec as text; what it does not ask for is left out."""
    shown = {each.name: getattr(spec, each.name) for each in fields(spec) if each.name not in ("features", "scale")}
    return {name: str(value).removeprefix("torch.") for name, value in shown.items() if value not in (None, False)}


def _prove(selection: Selection, wanted: Wanted, registry: BackendRegistry) -> ProofReport:
    began = time.perf_counter()
    try:
        options = chosen_options(wanted.merged, selection.name, registry).typed
        backend: AttentionBackend = build(selection, wanted.spec, registry, options=options)
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
