"""Every attention backend on the device: its verdict, whether it is right, and its speed beside the bounds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from gpu_checking.roofline import Roofline, seconds_of
from gpu_checking.section import Budget, Row
from inference_shardformer.attention.base import AttentionBackend, AttentionSpec
from inference_shardformer.attention.block_size import USUAL_BLOCK_SIZE
from inference_shardformer.attention.proof import make_trial
from inference_shardformer.attention.selector import Verdict, construct, judge
from inference_shardformer.attention.survey import BACKENDS, Survey
from inference_shardformer.conformance.runner import run_suite

# What shows wrong numbers; the rest of the kit is about manners, and is tested everywhere.
CHECKS = (
    "named_batches",
    "gqa_ratios",
    "head_dims",
    "block_sizes",
    "sliding_window",
    "softcap",
    "sinks",
    "large_scores",
    "ignores_stale_slots",
    "nan_spoils_no_other_sequence",
    "takes_views",
    "graphs",
    "memory_stays_flat",
)


def usual_spec(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> AttentionSpec:
    """A LLaMA of eight billion parameters on one rank."""
    return AttentionSpec(
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        scale=128**-0.5,
        dtype=dtype,
        device=device,
        block_size=USUAL_BLOCK_SIZE,
    )


def verdicts(spec: AttentionSpec, survey: Survey) -> list[tuple[Verdict, AttentionSpec]]:
    """Every candidate's verdict at the block size that it takes."""
    found = []
    for verdict in judge(spec, survey):
        backend = next(each.backend for each in survey.candidates if each.name == verdict.name)
        sizes = backend.capabilities.block_sizes if backend else None
        size = spec.block_size if sizes is None or spec.block_size in sizes else sizes.smallest
        own = replace(spec, block_size=size)
        found.append((next(each for each in judge(own, survey) if each.name == verdict.name), own))
    return found


def conformance_rows(
    spec: AttentionSpec, survey: Survey, budget: Budget, *, checks: Sequence[str] = CHECKS
) -> Iterator[Row]:
    """One row for each backend: refused with its reasons, or the kit's verdict on this device."""
    for verdict, _ in verdicts(spec, survey):
        if verdict.reasons:
            reasons = "; ".join(f"{reason.message} [{reason.code}]" for reason in verdict.reasons)
            yield Row(verdict.name, f"refused: {reasons}", data={"codes": [reason.code for reason in verdict.reasons]})
            continue
        if budget.left < 0:
            yield Row(verdict.name, "left out: no time is left")
            continue
        result = run_suite(_on(spec.device, BACKENDS.get(verdict.name)), only=checks)
        ran = [each for each in result.outcomes if each.status != "skipped"]
        failed = result.failures
        said = "; ".join(f"{name}: {message}" for name, message in list(failed.items())[:3])
        value = f"{len(ran) - len(failed)} of {len(ran)} trials right" + (f"; {said}" if failed else "")
        yield Row(verdict.name, value, bool(ran) and not failed, {"trials": len(ran), "failures": failed})


def _on(device: torch.device, backend: type[AttentionBackend]) -> type[AttentionBackend]:
    """The backend as if it served this type of device alone: others are tested without it."""
    alone = replace(backend.capabilities, devices=(device.type,))
    return type(backend.__name__, (backend,), {"capabilities": alone})


def speed_rows(
    spec: AttentionSpec, survey: Survey, bounds: Roofline, *, context: int = 16384, prompt: int = 4096, batch: int = 16
) -> Iterator[Row]:
    """Decode by the bytes of the keys and values it must read, prefill by the operations it must do."""
    for verdict, own in verdicts(spec, survey):
        if verdict.reasons or verdict.name == "reference":
            continue
        backend = construct(BACKENDS.get(verdict.name), own, None)
        for sequences in (1, batch):
            taken = _attend_seconds(backend, own, [(1, context)] * sequences)
            num_bytes = 2 * sequences * context * own.num_kv_heads * own.head_dim * own.dtype.itemsize
            share = num_bytes / taken / bounds.bytes_per_s
            name = f"{verdict.name} decode {sequences} x {context}"
            yield Row(name, f"{taken * 1e6:.0f} us, {share:.0%} of the copy bandwidth", data={"share": share})
        taken = _attend_seconds(backend, own, [(prompt, prompt)])
        flops = 2 * prompt * prompt * own.num_heads * own.head_dim  # two products, half of it masked
        share = flops / taken / bounds.flops_per_s
        name = f"{verdict.name} prefill {prompt}"
        yield Row(name, f"{taken * 1e6:.0f} us, {share:.0%} of the matrix rate", data={"share": share})


def _attend_seconds(backend: AttentionBackend, spec: AttentionSpec, sequences: list[tuple[int, int]]) -> float:
    """One layer's attention, planned before; the cache is larger than any on-chip memory at the usual sizes."""
    trial = make_trial(spec, sequences, backend.capabilities.kv_layout)
    layer = trial.kv_cache.layer(0)
    with torch.inference_mode():
        meta = backend.plan(trial.batch, trial.kv_cache)
        backend.write(trial.k, trial.v, layer, meta)
        return seconds_of(lambda: backend.attend(trial.q, layer, meta), spec.device)
