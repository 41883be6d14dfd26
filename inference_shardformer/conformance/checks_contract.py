"""Checks on what a class says of itself: version, name, facts, and that it keeps its word in both directions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from functools import partial

import torch

from inference_shardformer.attention.base import AttentionSpec, Feature
from inference_shardformer.attention.contract import contract_problem
from inference_shardformer.attention.spec import ENGINE_FEATURES
from inference_shardformer.conformance.cases import Case
from inference_shardformer.conformance.check import Check, Notes, Subject, Trial, broken_facts, spoken
from inference_shardformer.conformance.samples import DTYPES, combinations, dtype_name, main_case, outside
from inference_shardformer.conformance.verdicts import require


def _declares(subject: Subject) -> Iterator[Trial]:
    yield Trial("version_name_capabilities", partial(_require_contract, subject))


def _require_contract(subject: Subject) -> Notes | None:
    __tracebackhide__ = True
    problem = contract_problem(subject.backend)
    require(problem is None, f"{subject.backend.__qualname__}: {problem}")
    return {"contract_version": subject.backend.contract_version}


def _accepts(subject: Subject) -> Iterator[Trial]:
    """One trial for each declared value: it must be accepted in at least one combination, and by facts always."""
    rows = list(combinations(subject.declared).values())
    for axis in ("dtype", "head_dim", "block_size", "gqa_ratio", "window", "softcap", "sinks"):
        for value in dict.fromkeys(getattr(row, axis) for row in rows):
            cases = [row for row in rows if getattr(row, axis) == value]
            name = dtype_name(value) if isinstance(value, torch.dtype) else value
            yield Trial(f"{axis}_{name}", partial(_require_accepted, subject, cases))


def _require_accepted(subject: Subject, cases: list[Case]) -> Notes | None:
    __tracebackhide__ = True
    refusals = [subject.backend.reasons(case.spec(subject.device)) for case in cases]
    for reasons in refusals:
        require(not broken_facts(reasons), f"it refuses what it declares: {spoken(reasons)}")
    require(
        any(not reasons for reasons in refusals),
        f"it declares this and refuses it in all of {len(cases)} combinations: {spoken(refusals[0])}",
    )
    return {"refused_combinations": sum(map(bool, refusals))}


def _refuses(subject: Subject) -> Iterator[Trial]:
    """One trial for each value that is not declared, with the code that the refusal must carry."""
    declared, spec = subject.declared, main_case(subject.declared).spec(subject.device)
    asked: list[tuple[str, str, AttentionSpec]] = [
        (f"dtype_{dtype_name(dtype)}", "dtype", replace(spec, dtype=dtype))
        for dtype in DTYPES
        if dtype not in declared.dtypes
    ]
    asked += [
        (f"kv_dtype_{dtype_name(dtype)}", "kv_dtype", replace(spec, kv_dtype=dtype))
        for dtype in (torch.int8, *declared.dtypes)
        if dtype not in (spec.dtype, *declared.kv_dtypes)
    ]
    asked += [(f"head_dim_{n}", "head_dim", replace(spec, head_dim=n)) for n in outside(declared.head_dims)]
    asked += [(f"block_size_{n}", "block_size", replace(spec, block_size=n)) for n in outside(declared.block_sizes)]
    asked += [
        (f"gqa_ratio_{n}", "gqa_ratio", replace(spec, num_heads=n * spec.num_kv_heads))
        for n in outside(declared.gqa_ratios)
    ]
    asked += [
        (feature.value, f"feature_{feature.value}", _needing(spec, feature))
        for feature in Feature
        if feature not in declared.features
    ]
    asked += [("device_meta", "device", replace(spec, device=torch.device("meta")))]
    asked += [
        ("uneven_heads", "head_counts", replace(spec, num_heads=3, num_kv_heads=2)),
        ("no_kv_heads", "shape", replace(spec, num_kv_heads=0)),
        ("window_0", "shape", replace(spec, sliding_window=0)),
    ]
    for name, code, wanted in asked:
        yield Trial(name, partial(_require_refused, subject, wanted, code))


def _needing(spec: AttentionSpec, feature: Feature) -> AttentionSpec:
    """A spec that needs the feature in the way that a model does."""
    changes: dict[Feature, dict[str, object]] = {
        Feature.SLIDING_WINDOW: {"sliding_window": 8},
        Feature.SOFTCAP: {"softcap": 30.0},
        Feature.SINKS: {"sinks": True},
    }
    return replace(spec, **changes.get(feature, {"features": spec.features | {feature}}))  # type: ignore[arg-type]


def _require_refused(subject: Subject, spec: AttentionSpec, code: str) -> Notes | None:
    __tracebackhide__ = True
    reasons = subject.backend.reasons(spec)
    codes = [reason.code for reason in reasons]
    require(code in codes, f"it does not refuse what it does not declare: no reason {code} among {codes or 'none'}")
    silent = [reason.code for reason in reasons if not (reason.message and reason.remedy)]
    require(not silent, f"reasons without a message or a remedy: {silent}")
    return None


def _answers_alike(subject: Subject) -> Iterator[Trial]:
    yield Trial("twice", partial(_require_same_answer, subject))


def _require_same_answer(subject: Subject) -> Notes | None:
    __tracebackhide__ = True
    good = main_case(subject.declared).spec(subject.device)
    for spec in (good, replace(good, features=ENGINE_FEATURES), replace(good, num_kv_heads=0)):
        first, second = subject.backend.reasons(spec), subject.backend.reasons(spec)
        require(first == second, f"reasons changes its answer: {spoken(first)} and then {spoken(second)}")
        require(first is not second, "reasons hands out the same list again, which its caller may change")
    return None


def _keeps_spec(subject: Subject) -> Iterator[Trial]:
    yield Trial("spec", partial(_require_spec, subject))


def _require_spec(subject: Subject) -> Notes | None:
    __tracebackhide__ = True
    case = main_case(subject.declared)
    wanted, kept = case.spec(subject.device), subject.build(case).spec
    wrong = [field.name for field in fields(wanted) if getattr(wanted, field.name) != getattr(kept, field.name, None)]
    require(not wrong, f"its spec differs from the one it was built for in {', '.join(wrong)}")
    return None


DECLARES = Check("declares_its_contract", "Version, name and facts are declared.", _declares, on_device=False)
CHECKS = (
    Check("accepts_what_it_declares", "Every declared value is accepted.", _accepts, on_device=False),
    Check(
        "refuses_what_it_does_not_declare",
        "Whatever is not declared is refused, with its code.",
        _refuses,
        on_device=False,
    ),
    Check("reasons_are_stable", "The same question gets the same answer.", _answers_alike, on_device=False),
    Check("keeps_its_spec", "An instance holds the spec that it was built for.", _keeps_spec),
)
