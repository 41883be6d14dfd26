"""Checks on independence: of the company in a batch, of other instances, of the number of runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch

from inference_shardformer.conformance.cases import RAGGED_DECODES, Case
from inference_shardformer.conformance.check import Check, Notes, Subject, Trial, tolerance
from inference_shardformer.conformance.samples import inside, main_case
from inference_shardformer.conformance.trials import in_every_dtype
from inference_shardformer.conformance.verdicts import require, require_close, same_bits, worst_difference


def _alone_and_in_company(subject: Subject, case: Case) -> Notes:
    """Every sequence by itself, over the same cache; notes how many results are equal bit for bit."""
    __tracebackhide__ = True
    backend, problem = subject.build(case), subject.problem(case)
    together = problem.step(backend)
    num_exact, worst = 0, 0.0
    for seq in range(problem.batch.num_seqs):
        single, tokens = problem.alone(seq)
        out = single.step(subject.build(replace(case, sequences=(case.sequences[seq],))))
        what = f"sequence {seq} {case.sequences[seq]} alone differs from the same in a batch"
        worst = max(worst, require_close(out, together[tokens].double(), tolerance(case), what))
        num_exact += same_bits(out, together[tokens])
    return {"worst_difference": worst, "tolerance": tolerance(case), "exact": f"{num_exact} of {len(case.sequences)}"}


def _nan_stays_at_home(subject: Subject, case: Case) -> Notes | None:
    """One decoding sequence has NaN keys and values. Its own result is lost, no other one is."""
    __tracebackhide__ = True
    case, sick = replace(case, sequences=RAGGED_DECODES), 3
    backend, problem = subject.build(case), subject.problem(case)
    layer = problem.layers[0]
    layer.k[sick], layer.v[sick] = torch.nan, torch.nan
    out = problem.step(backend)
    others = [i for i in range(len(out)) if i != sick]
    require_close(out[others], layer.expected[others], tolerance(case), "another sequence's NaN spoils the result")
    require(bool(out[sick].isnan().any()), "NaN in keys and values does not show in their own sequence's result")
    return None


def _same_bits_again(subject: Subject, case: Case) -> Notes | None:
    __tracebackhide__ = True
    backend = subject.build(case)
    runs = [subject.problem(case).step(each) for each in (backend, backend, subject.build(case))]
    worst = max(worst_difference(runs[0], other) for other in runs[1:])
    require(
        all(same_bits(runs[0], other) for other in runs[1:]),
        f"the same step gave different results, by up to {worst:.3g}, in two runs or in a second instance",
    )
    return None


def _steps_do_not_meet(subject: Subject, case: Case) -> Notes | None:
    """One instance serves batches of other lengths, sizes and blocks in turn, and the first one again."""
    __tracebackhide__ = True
    backend = subject.build(case)
    for sequences in (case.sequences, RAGGED_DECODES, ((0, 1),), case.sequences):
        other = replace(case, sequences=sequences)
        problem = subject.problem(other)
        subject.require_right(other, problem.step(backend), problem)
    return None


def _instances_do_not_meet(subject: Subject) -> Iterator[Trial]:
    yield Trial("two_at_once", partial(_two_at_once, subject))


def _two_at_once(subject: Subject) -> Notes | None:
    """Two instances of different shapes, built first and then used in turns."""
    __tracebackhide__ = True
    case, declared = main_case(subject.declared), subject.declared
    other = replace(
        case,
        num_kv_heads=1,
        head_dim=inside("head_dim", declared.head_dims)[-1],
        block_size=inside("block_size", declared.block_sizes)[-1],
    )
    pairs = [(each, subject.build(each), subject.problem(each)) for each in (case, other)]
    metas = [backend.plan(problem.batch, problem.kv_cache) for _, backend, problem in pairs]
    for (each, backend, problem), meta in zip(pairs, metas, strict=True):
        subject.require_right(each, problem.step(backend, meta), problem)
    return None


CHECKS = (
    Check(
        "alone_equals_in_company",
        "A sequence's result does not depend on what else is in the batch.",
        in_every_dtype(_alone_and_in_company),
    ),
    Check("nan_spoils_no_other_sequence", "NaN stays where it is.", in_every_dtype(_nan_stays_at_home)),
    Check("deterministic", "The same step gives the same bits.", in_every_dtype(_same_bits_again)),
    Check("steps_do_not_meet", "A step owes nothing to earlier ones.", in_every_dtype(_steps_do_not_meet)),
    Check("instances_do_not_meet", "Two instances do not disturb each other.", _instances_do_not_meet),
)
