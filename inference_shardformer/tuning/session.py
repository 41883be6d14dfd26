"""Measures the backends of one model on all ranks of this launch; every rank gets the same comparison."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch

from inference_shardformer.attention.base import AttentionSpec
from inference_shardformer.attention.selector import construct, judge, select
from inference_shardformer.attention.survey import BACKENDS, BackendRegistry, make_survey
from inference_shardformer.config.inference import TUNED
from inference_shardformer.config.loader import merge_layers
from inference_shardformer.config.sources import Layers
from inference_shardformer.config.violations import raise_all
from inference_shardformer.doctor.attention import Wanted, wanted_by_model, wanted_usually
from inference_shardformer.errors import BackendUnavailableError
from inference_shardformer.ranks import Ranks
from inference_shardformer.resolving.options import check_options, chosen_options
from inference_shardformer.resolving.resolution import resolve_threads
from inference_shardformer.sharding.plan import RankLayout
from inference_shardformer.tuning.buckets import Bucket, served
from inference_shardformer.tuning.comparison import Comparison
from inference_shardformer.tuning.fingerprint import fingerprint_of, spec_key
from inference_shardformer.tuning.measure import Clock, Contender, Contenders, make_clock, measure
from inference_shardformer.tuning.measurement import Measurement, rows_from_bytes, rows_to_bytes, slowest_of


class Field(NamedTuple):
    """Who takes part on this rank, and what keeps the others out."""

    contenders: Contenders
    refused: dict[str, str]
    fingerprint: dict[str, str]


def compare_backends(
    layers: Layers,
    model: str | None,
    buckets: Sequence[Bucket],
    *,
    rounds: int,
    registry: BackendRegistry = BACKENDS,
    clock: Clock | None = None,
) -> tuple[Comparison, ...]:
    """Join the ranks, measure for each group of layers, and leave them. A representative model stands for no model.

    Raises what is wrong with the settings or the model, and `EnvironmentMismatchError` if ranks differ in what a
    profile depends on.
    """
    merged = merge_layers(layers)
    raise_all([*merged.violations, *check_options(merged, registry)])
    ranks = Ranks.join(merged.shard, None)
    num_threads = torch.get_num_threads()
    try:
        torch.set_num_threads(resolve_threads(merged.shard, ranks.ranks_on_host)[0])
        return _compare(layers, model, buckets, ranks, rounds, registry, clock or make_clock(ranks.device))
    finally:
        torch.set_num_threads(num_threads)
        ranks.close()


def _compare(
    layers: Layers,
    model: str | None,
    buckets: Sequence[Bucket],
    ranks: Ranks,
    rounds: int,
    registry: BackendRegistry,
    clock: Clock,
) -> tuple[Comparison, ...]:
    layout = RankLayout(ranks.group.size, ranks.group.rank)
    wanted = ranks.guard.together("tuning", lambda: _wanted(layers, model, layout, ranks.device))
    ranks.guard.agree("tuning", {"layers": str(wanted.groups.group_of)})
    groups = range(len(wanted.groups.specs))
    return tuple(_compare_group(wanted, group, buckets, ranks, rounds, registry, clock) for group in groups)


def _compare_group(
    wanted: Wanted,
    layer_group: int,
    buckets: Sequence[Bucket],
    ranks: Ranks,
    rounds: int,
    registry: BackendRegistry,
    clock: Clock,
) -> Comparison:
    guard, group = ranks.guard, ranks.group
    spec = wanted.groups.specs[layer_group]
    field = guard.together("tuning", lambda: enter(wanted, spec, registry))
    guard.agree("tuning", {**field.fingerprint, "candidates": ", ".join(field.contenders)})
    rows: list[Measurement] = []
    for bucket in served(buckets, spec):  # ranks keep step, so that all of them load the machine at once
        work = partial(measure, field.contenders, spec, (bucket,), rounds=rounds, clock=clock)
        rows += guard.together(f"measuring {bucket}", work)
    everyone = [rows_from_bytes(data) for data in group.all_gather_bytes(rows_to_bytes(rows))]
    keys = dict.fromkeys(key.decode() for key in group.all_gather_bytes(spec_key(spec).encode()))
    return Comparison(
        of=wanted.of if len(wanted.groups.specs) == 1 else f"{wanted.groups.named(layer_group)} of {wanted.of}",
        layers=wanted.groups.layers(layer_group),
        device=str(ranks.device),
        num_ranks=group.size,
        rounds=rounds,
        keys=tuple(keys),
        rows=slowest_of(everyone),
        refused=field.refused,
        fingerprint=field.fingerprint,
    )


def enter(wanted: Wanted, spec: AttentionSpec, registry: BackendRegistry) -> Field:
    """Judge every candidate as an engine would, and construct the able ones, or the one that was asked for.

    Raises `BackendUnavailableError` if that one cannot serve, or if none can.
    """
    requested = wanted.merged.inference.attention.backend
    survey = make_survey(spec.device, registry)
    is_open = requested in ("auto", TUNED)
    select(spec, "auto" if is_open else requested, survey)
    verdicts = judge(spec, survey)
    able = [verdict.name for verdict in verdicts if not verdict.reasons and (is_open or verdict.name == requested)]
    refused = {
        verdict.name: "; ".join(f"{reason.message} [{reason.code}]" for reason in verdict.reasons)
        for verdict in verdicts
        if verdict.reasons
    }
    contenders: dict[str, Contender] = {}
    for name in able:
        try:
            options = chosen_options(wanted.merged, name, registry).typed
            contenders[name] = construct(registry.get(name), spec, options)
        except BackendUnavailableError as exc:
            contenders[name] = exc
    return Field(contenders, refused, fingerprint_of(survey, spec, wanted.merged.inference.attention.options))


def _wanted(layers: Layers, model: str | None, layout: RankLayout, device: torch.device) -> Wanted:
    if model is None:
        return wanted_usually(layers, layout, device)
    return wanted_by_model(model, layers, layout, device)
