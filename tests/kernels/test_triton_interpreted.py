"""The tests in `interpreted/`, each file in a process in which Triton's interpreter is on."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("triton")

from interpreting import interpreter_problem, run_interpreted

FOLDER = Path(__file__).parent / "interpreted"


@pytest.fixture(scope="module", autouse=True)
def interpreter(tmp_path_factory):
    problem = interpreter_problem(tmp_path_factory.mktemp("interpreter"))
    if problem:
        pytest.skip(problem)


@pytest.mark.parametrize("name", ["attention", "elementwise", "engine", "experts", "fp8", "sampling"])
def test_kernels_are_right_in_the_interpreter(name):
    assert run_interpreted(FOLDER / f"{name}.py") >= 8


def test_every_file_is_run():
    assert {path.stem for path in FOLDER.glob("*.py")} == {
        "attention",
        "elementwise",
        "engine",
        "experts",
        "fp8",
        "sampling",
    }
