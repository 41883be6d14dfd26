"""in_every_dtype: the usual trials of a check, the richest declared batch in each declared type."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

from inference_shardformer.conformance.cases import Case
from inference_shardformer.conformance.check import Notes, Subject, Trial
from inference_shardformer.conformance.samples import dtype_name, main_case

Body = Callable[[Subject, Case], Notes | None]


def in_every_dtype(body: Body) -> Callable[[Subject], Iterator[Trial]]:
    """What a check's `trials` may be."""

    def trials(subject: Subject) -> Iterator[Trial]:
        for dtype in subject.declared.dtypes:
            case = replace(main_case(subject.declared), dtype=dtype)
            yield Trial(dtype_name(dtype), partial(body, subject, case))

    return trials
