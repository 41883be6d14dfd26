"""Every broken backend of the zoo is caught by the intended trial, and sound ones by none."""

from __future__ import annotations

import pytest
from backend_zoo.claims import CannotBeBuilt, KeysInBfloat16
from backend_zoo.hooks import SoundGraphs
from backend_zoo.layouts import SoundHnd
from backend_zoo.sound import SoundAttention
from backend_zoo.specimens import SPECIMENS, Specimen

from inference_shardformer.conformance import run_suite
from inference_shardformer.conformance.catalogue import CHECKS, PRESENT

SLOW = frozenset({"memory_stays_flat", "import_does_no_work"})


@pytest.mark.parametrize("specimen", SPECIMENS, ids=lambda specimen: specimen.backend.name)
def test_is_caught_by_the_intended_trial(specimen: Specimen) -> None:
    result = run_suite(specimen.backend, without=SLOW - {specimen.check})
    assert specimen.caught_by in {*result.failures, *result.failed_checks}, result.failures
    assert result.failed_checks <= specimen.also | {specimen.check}, result.failures
    if specimen.spared:
        passed = {f"{each.check}[{each.id}]" for each in result.outcomes if each.status == "passed"}
        assert specimen.spared in passed


@pytest.mark.parametrize(
    "backend", [SoundAttention, SoundGraphs, SoundHnd, KeysInBfloat16], ids=lambda backend: backend.name
)
def test_a_sound_backend_passes_everything(backend) -> None:
    result = run_suite(backend, without=() if backend is SoundAttention else SLOW)
    assert not result.failures
    assert {each.status for each in result.outcomes} == {"passed"}


def test_a_backend_that_cannot_be_built_says_so_first() -> None:
    failures = run_suite(CannotBeBuilt, without=SLOW).failures
    name, message = next(iter(failures.items()))
    assert name == "is_built_on_every_declared_device[cpu]"
    assert "libzoo.so" in message


def test_no_check_is_idle() -> None:
    checks = {check.name for check in CHECKS}
    assert checks == {specimen.check for specimen in SPECIMENS}
    assert PRESENT.name not in checks


def test_the_zoo_is_as_large_as_promised() -> None:
    assert len({specimen.backend.name for specimen in SPECIMENS}) == len(SPECIMENS) >= 20
