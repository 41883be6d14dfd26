"""The catalogue: every check, and every trial of one backend on every device that it declares."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch

from inference_shardformer.attention.base import AttentionBackend, AttentionSpec
from inference_shardformer.attention.contract import contract_problem
from inference_shardformer.conformance import (
    checks_contract,
    checks_effects,
    checks_hooks,
    checks_isolation,
    checks_resources,
    checks_results,
)
from inference_shardformer.conformance.check import Check, MakeBackend, Notes, Subject
from inference_shardformer.conformance.samples import main_case

CHECKS: tuple[Check, ...] = (
    checks_contract.DECLARES,
    *checks_contract.CHECKS,
    *checks_results.CHECKS,
    *checks_effects.CHECKS,
    *checks_isolation.CHECKS,
    *checks_hooks.CHECKS,
    *checks_resources.CHECKS,
)


class PlannedTrial(NamedTuple):
    """A trial of a check, under the name that it is reported by. `skip` says why it cannot run here."""

    check: Check
    id: str
    body: Callable[[], Notes | None]
    skip: str = ""


def plan_suite(backend: type[AttentionBackend], make: MakeBackend | None = None) -> Iterator[PlannedTrial]:
    """Every trial of a backend. One that breaks the contract itself gets that check alone.

    `make` constructs it for a spec; by default its class is called, with its options' defaults if it has options.
    """
    if contract_problem(backend) is not None:
        yield from _planned(checks_contract.DECLARES, Subject(backend, backend, torch.device("cpu")), "")
        return
    subjects = [
        Subject(backend, make or partial(_construct, backend), torch.device(name))
        for name in backend.capabilities.devices
    ]
    for subject in subjects:
        absence = _absence(subject.device.type)
        yield PlannedTrial(PRESENT, subject.device.type, partial(_present, subject), absence)
    present = [subject for subject in subjects if not _absence(subject.device.type)]
    for check in CHECKS:
        if not check.on_device:
            yield from _planned(check, subjects[0], "")
            continue
        for subject in present:
            yield from _planned(check, subject, f"{subject.device.type}-")


def _construct(backend: type[AttentionBackend], spec: AttentionSpec) -> AttentionBackend:
    return backend(spec) if backend.Options is None else backend(spec, backend.Options())


def _planned(check: Check, subject: Subject, prefix: str) -> Iterator[PlannedTrial]:
    for trial in check.trials(subject):
        yield PlannedTrial(check, f"{prefix}{trial.id}", trial.body)


def _present(subject: Subject) -> None:
    subject.build(main_case(subject.declared))


def _absence(device_type: str) -> str:
    """Why a type of device cannot be used here; empty if it can."""
    try:
        count = torch.get_device_module(device_type).device_count()
    except RuntimeError:
        count = 0
    return "" if count else f"torch sees no {device_type} device here, so nothing was tried on one"


PRESENT = Check("is_built_on_every_declared_device", "It can be constructed.", lambda subject: ())
