"""Checks on the hooks that only some backends have: they work where declared and refuse where not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch

from inference_shardformer.attention.base import AttentionBackend, AttentionMetadata, Feature
from inference_shardformer.conformance.check import Check, Notes, Subject, Trial
from inference_shardformer.conformance.problem import Problem
from inference_shardformer.conformance.samples import main_case
from inference_shardformer.conformance.verdicts import require
from inference_shardformer.errors import BackendUnavailableError

Call = Callable[[AttentionBackend, Problem, AttentionMetadata], object]


def _with_sinks(backend: AttentionBackend, problem: Problem, meta: AttentionMetadata) -> object:
    layer = problem.layers[0]
    return backend.attend_with_sinks(layer.q, problem.kv_cache.layer(0), meta, torch.zeros_like(layer.q[0, :, 0]))


_HOOKS: dict[str, tuple[Feature, Call]] = {
    "attend_with_sinks": (Feature.SINKS, _with_sinks),
    "plan_capture": (Feature.GRAPHS, lambda backend, problem, meta: backend.plan_capture(2, problem.kv_cache)),
    "replan": (Feature.GRAPHS, lambda backend, problem, meta: backend.replan(problem.batch, meta)),
}


def _absent_hooks(subject: Subject) -> Iterator[Trial]:
    for name, (feature, call) in _HOOKS.items():
        if feature not in subject.declared.features:
            yield Trial(name, partial(_require_refusal, subject, name, feature, call))


def _require_refusal(subject: Subject, name: str, feature: Feature, call: Call) -> Notes | None:
    __tracebackhide__ = True
    case = main_case(subject.declared)
    backend, problem = subject.build(case), subject.problem(case)
    meta = backend.plan(problem.batch, problem.kv_cache)
    backend.write(problem.layers[0].k, problem.layers[0].v, problem.kv_cache.layer(0), meta)
    try:
        call(backend, problem, meta)
    except BackendUnavailableError:
        return None
    require(False, f"{name} answers although {feature.value} is not declared")
    return None


def _graphs(subject: Subject) -> Iterator[Trial]:
    if Feature.GRAPHS in subject.declared.features:
        yield Trial("one_plan_many_batches", partial(_replans, subject))


def _replans(subject: Subject) -> Notes | None:
    """One captured plan, refilled for batches of other lengths and blocks; every result is right."""
    __tracebackhide__ = True
    base = main_case(subject.declared)
    batches = [((20, 1), (7, 1), (33, 1)), ((1, 1), (90, 1), (0, 1)), ((64, 1), (65, 1), (2, 1))]
    cases = [replace(base, sequences=(*sequences, (200, 1))) for sequences in batches]  # equally large caches
    problems = [subject.problem(case) for case in cases]
    backend = subject.build(cases[0])
    largest = max(problems, key=lambda problem: problem.kv_cache.num_blocks)
    meta = backend.plan_capture(len(cases[0].sequences), largest.kv_cache)
    addresses = _addresses(meta)
    for case, problem in zip(cases, problems, strict=True):
        backend.replan(problem.batch, meta)
        require(_addresses(meta) == addresses, "replan moved a tensor of the captured plan to another address")
        subject.require_right(case, problem.step(backend, meta), problem)
    return None


def _addresses(meta: AttentionMetadata) -> dict[str, int]:
    """Where the tensors of a plan and of its batch lie."""
    held = {**vars(meta), **{f"batch.{name}": value for name, value in vars(meta.batch).items()}}
    return {name: value.data_ptr() for name, value in held.items() if isinstance(value, torch.Tensor)}


CHECKS = (
    Check("hooks_of_absent_features_refuse", "A hook without its feature raises a typed error.", _absent_hooks),
    Check("graphs", "A captured plan is refilled in place.", _graphs),
)
