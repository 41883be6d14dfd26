"""Checks on what attend returns: every named batch, every fact by itself, and pairs of facts, against the oracle."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial

import torch

from inference_shardformer.attention.base import Feature
from inference_shardformer.conformance.cases import RAGGED_DECODES, Case
from inference_shardformer.conformance.check import Check, Notes, Subject, Trial
from inference_shardformer.conformance.samples import (
    base_case,
    batches,
    combinations,
    dtype_name,
    inside,
    main_case,
)
from inference_shardformer.conformance.verdicts import require


def _equals(subject: Subject, case: Case) -> Notes:
    __tracebackhide__ = True
    backend, problem = subject.build(case), subject.problem(case)
    return subject.require_right(case, problem.step(backend), problem)


def _each(subject: Subject, cases: Iterable[tuple[str, Case]]) -> Iterator[Trial]:
    """A trial for each case in its own type."""
    for name, case in cases:
        yield Trial(name, partial(_equals, subject, case))


def _in_every_dtype(subject: Subject, cases: Iterable[tuple[str, Case]]) -> Iterator[Trial]:
    listed = list(cases)
    for dtype in subject.declared.dtypes:
        in_dtype = ((f"{dtype_name(dtype)}-{name}", replace(case, dtype=dtype)) for name, case in listed)
        yield from _each(subject, in_dtype)


def _named_batches(subject: Subject) -> Iterator[Trial]:
    base = base_case(subject.declared)
    table = batches(subject.declared, base.block_size)
    return _in_every_dtype(subject, ((name, replace(base, sequences=batch)) for name, batch in table.items()))


def _gqa_ratios(subject: Subject) -> Iterator[Trial]:
    case = main_case(subject.declared)
    ratios = inside("gqa_ratio", subject.declared.gqa_ratios)
    named = [(f"{ratio}_heads_per_kv_head", replace(case, gqa_ratio=ratio)) for ratio in ratios]
    alone = [(f"{ratio}_heads_on_one_kv_head", replace(case, gqa_ratio=ratio, num_kv_heads=1)) for ratio in ratios[:2]]
    return _each(subject, named + alone)


def _head_dims(subject: Subject) -> Iterator[Trial]:
    case, sizes = main_case(subject.declared), inside("head_dim", subject.declared.head_dims)
    return _each(subject, ((f"head_dim_{size}", replace(case, head_dim=size)) for size in sizes))


def _block_sizes(subject: Subject) -> Iterator[Trial]:
    base = base_case(subject.declared)
    for size in inside("block_size", subject.declared.block_sizes):
        table = batches(subject.declared, size)
        names = [name for name in ("block_boundaries", "ragged_decodes") if name in table]
        cases = [(f"block_size_{size}-{name}", replace(base, sequences=table[name], block_size=size)) for name in names]
        yield from _each(subject, cases)


def _windows(subject: Subject) -> Iterator[Trial]:
    if Feature.SLIDING_WINDOW not in subject.declared.features:
        return iter(())
    case = main_case(subject.declared)
    decodes = replace(case, sequences=RAGGED_DECODES)
    sizes = dict.fromkeys((1, 2, 8, case.block_size, 1000))
    named = [(f"window_{size}", replace(case, window=size)) for size in sizes]
    return _in_every_dtype(subject, [*named, ("window_8-ragged_decodes", replace(decodes, window=8))])


def _softcap(subject: Subject) -> Iterator[Trial]:
    if Feature.SOFTCAP not in subject.declared.features:
        return iter(())
    case = main_case(subject.declared)
    named = [(f"softcap_{cap:g}", replace(case, softcap=cap)) for cap in (0.5, 2.0, 50.0)]
    return _in_every_dtype(subject, named)


def _sinks(subject: Subject) -> Iterator[Trial]:
    if Feature.SINKS not in subject.declared.features:
        return iter(())
    return _in_every_dtype(subject, [("sinks", replace(main_case(subject.declared), sinks=True))])


def _kv_dtypes(subject: Subject) -> Iterator[Trial]:
    for kv_dtype in subject.declared.kv_dtypes:
        name = f"keys_in_{dtype_name(kv_dtype)}"
        yield from _in_every_dtype(subject, [(name, replace(main_case(subject.declared), kv_dtype=kv_dtype))])


def _combinations(subject: Subject) -> Iterator[Trial]:
    return _each(subject, combinations(subject.declared).items())


def _large_scores(subject: Subject) -> Iterator[Trial]:
    return (Trial(dtype_name(dtype), partial(_survives, subject, dtype)) for dtype in subject.declared.dtypes)


def _survives(subject: Subject, dtype: torch.dtype) -> Notes:
    """Scores of tens of thousands: the softmax takes the best key alone, and a plain exp() overflows."""
    __tracebackhide__ = True
    case = replace(main_case(subject.declared), dtype=dtype)
    backend, problem = subject.build(case), subject.problem(case)
    layer = problem.layers[0]
    layer.q *= 1e4
    out = problem.step(backend)
    require(bool(out.isfinite().all()), "attend returned values that are not finite for large scores")
    bound = max(tensor[tensor.isfinite()].abs().max().item() for tensor in problem.kv_cache.layer(0)[1:])
    require(out.abs().max().item() <= bound * 1.01, "attend returned values larger than any value in the cache")
    return {"largest": out.abs().max().item()}


CHECKS = (
    Check("named_batches", "Every named batch equals dense attention, in every declared type.", _named_batches),
    Check("gqa_ratios", "Each query head reads the key head that it belongs to.", _gqa_ratios),
    Check("head_dims", "Every declared head dimension works.", _head_dims),
    Check("block_sizes", "Every declared block size works, at the edges of blocks too.", _block_sizes),
    Check("sliding_window", "A query sees its window and nothing older.", _windows),
    Check("softcap", "Scores are capped before the softmax.", _softcap),
    Check("sinks", "Sinks take their share of the softmax and add no value.", _sinks),
    Check("kv_dtypes", "Keys and values may be stored in every declared type.", _kv_dtypes),
    Check("declared_combinations", "Any two declared values work together.", _combinations),
    Check("large_scores", "Large scores overflow nothing.", _large_scores),
)
