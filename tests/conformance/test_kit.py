"""The kit itself: which tests it makes, what it skips, how it reports, what it costs to have installed."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from itertools import combinations, product

import pytest
import torch
from backend_zoo.results import NoWindow
from backend_zoo.sound import SoundAttention
from hypothesis import given, settings
from hypothesis import strategies as st

from inference_shardformer.attention.base import ANY_SIZE, Feature, Reason, Sizes
from inference_shardformer.attention.sdpa import SdpaAttention
from inference_shardformer.conformance import run_suite
from inference_shardformer.conformance.cases import Case, named_batches
from inference_shardformer.conformance.catalogue import CHECKS, plan_suite
from inference_shardformer.conformance.pairwise import pairwise
from inference_shardformer.conformance.problem import make_problem
from inference_shardformer.conformance.samples import inside, outside
from inference_shardformer.conformance.verdicts import TOLERANCES, ConformanceFailure, require_close, same_bits

pytest_plugins = "pytester"


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=2, max_size=5))
def test_any_two_values_of_two_axes_meet(sizes: list[int]) -> None:
    axes = {f"axis{i}": [f"{i}.{value}" for value in range(size)] for i, size in enumerate(sizes)}
    rows = pairwise(axes)
    for one, other in combinations(axes, 2):
        assert {(row[one], row[other]) for row in rows} == set(product(axes[one], axes[other]))
    assert all(list(row) == list(axes) for row in rows)
    assert len(rows) < 2 * max(a * b for a, b in combinations(sizes, 2)) + len(sizes)


@pytest.mark.parametrize("axis", ["head_dim", "block_size", "gqa_ratio"])
@pytest.mark.parametrize(
    "sizes",
    [ANY_SIZE, Sizes.only(3), Sizes.only(7, 64, 128), Sizes.multiples_of(48, low=96), Sizes(low=2, high=5)],
    ids=str,
)
def test_samples_lie_inside_and_outside(axis: str, sizes: Sizes) -> None:
    assert inside(axis, sizes)
    assert all(size in sizes for size in inside(axis, sizes))
    assert not any(size in sizes for size in outside(sizes))
    assert outside(sizes) or sizes is ANY_SIZE


@pytest.mark.parametrize("block_size", [1, 2, 3, 16, 256])
def test_the_table_has_decodes_first_and_whole_sequences(block_size: int) -> None:
    table = named_batches(block_size)
    assert len(table) >= 12
    for sequences in table.values():
        query_lens = [new for _, new in sequences]
        assert all(past >= 0 and new >= 1 for past, new in sequences)
        assert query_lens[: query_lens.count(1)] == [1] * query_lens.count(1)
    boundaries = {(past + new) % block_size for past, new in table["block_boundaries"]}
    assert {0, 1 % block_size, (block_size - 1) % block_size} <= boundaries


def test_a_problem_poisons_what_no_sequence_owns() -> None:
    problem = make_problem(Case(((20, 1), (0, 19))))
    keys = problem.kv_cache.layer(0).keys.flatten(0, 1)
    written = keys.isfinite().all(dim=2).all(dim=1)
    assert written.sum() == 20
    assert written[problem.pages.slots[0][:20]].all()
    assert keys[0].isnan().all()


def test_the_same_problem_each_time() -> None:
    first, second = make_problem(Case(((20, 1),))), make_problem(Case(((20, 1),)))
    first.layers[0].q.zero_()
    assert second.layers[0].q.any()
    assert same_bits(second.layers[0].k, first.layers[0].k)
    assert not same_bits(make_problem(Case(((20, 1),)), seed=1).layers[0].k, first.layers[0].k)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1.0])
def test_a_comparison_fails_where_it_should(value: float) -> None:
    expected, actual = torch.zeros(4, 2, 3), torch.zeros(4, 2, 3)
    assert require_close(actual, expected, 0.0, "it") == 0.0
    actual[2, 1, 0] = value
    with pytest.raises(ConformanceFailure, match=r"1 of 4 tokens are wrong, the first is token 2 at head 1"):
        require_close(actual, expected, 0.5, "it")


def test_tolerances_are_those_of_the_types() -> None:
    assert TOLERANCES[torch.float32] < TOLERANCES[torch.float16] < TOLERANCES[torch.bfloat16]


class Elsewhere(SoundAttention):
    """Runs on devices that no test machine has, too."""

    name = "elsewhere"
    capabilities = replace(SoundAttention.capabilities, devices=("cpu", "hpu"))


class OnlyElsewhere(SoundAttention):
    """Runs on a device that no test machine has."""

    name = "only_elsewhere"
    capabilities = replace(SoundAttention.capabilities, devices=("hpu",))


def test_an_absent_device_is_skipped_by_name_and_nothing_else_is() -> None:
    plan, sound = list(plan_suite(Elsewhere)), list(plan_suite(SoundAttention))
    skipped = [trial for trial in plan if trial.skip]
    assert [(trial.check.name, trial.id) for trial in skipped] == [("is_built_on_every_declared_device", "hpu")]
    assert "torch sees no hpu device here" in skipped[0].skip
    assert len(plan) == len(sound) + 1


def test_without_any_device_what_is_declared_is_still_checked() -> None:
    result = run_suite(OnlyElsewhere, without={"import_does_no_work"})
    assert not result.failures
    passed = {each.check for each in result.outcomes if each.status == "passed"}
    assert {"declares_its_contract", "accepts_what_it_declares", "refuses_what_it_does_not_declare"} <= passed
    assert [each.check for each in result.outcomes if each.status == "skipped"] == ["is_built_on_every_declared_device"]


class NoWideBfloat16(SoundAttention):
    """Cannot serve one pair of facts, and says so."""

    name = "no_wide_bfloat16"

    @classmethod
    def extra_reasons(cls, spec):
        wide = spec.dtype == torch.bfloat16 and spec.head_dim == 32
        return [Reason("wide_bfloat16", "no bf16 at head_dim 32", "use fp32")] if wide else []


def test_an_honest_exception_is_skipped_where_it_applies() -> None:
    result = run_suite(NoWideBfloat16, only={"declared_combinations", "accepts_what_it_declares"})
    assert not result.failures
    skipped = [each for each in result.outcomes if each.status == "skipped"]
    assert skipped
    assert all("bfloat16" in each.id and "dim32" in each.id for each in skipped)
    assert all("no bf16 at head_dim 32 [wide_bfloat16]" in each.message for each in skipped)


def test_run_suite_runs_what_it_is_told() -> None:
    only = run_suite(SdpaAttention, only={"deterministic"})
    assert {each.check for each in only.outcomes} == {"deterministic"}
    assert "softcap" not in {each.check for each in run_suite(NoWindow, without={"softcap", *SLOW}).outcomes}


SLOW = ("memory_stays_flat", "import_does_no_work")


def test_it_measures_exactness_and_the_worst_difference() -> None:
    notes = [each.notes for each in run_suite(SoundAttention, only={"alone_equals_in_company"}).outcomes]
    assert [note["exact"] for note in notes] == ["7 of 7", "7 of 7"]
    assert all(note["worst_difference"] <= note["tolerance"] for note in notes)


def test_every_check_has_a_name_for_a_test_and_a_rule() -> None:
    names = [check.name for check in CHECKS]
    assert len(set(names)) == len(names)
    for check in CHECKS:
        assert f"test_{check.name}".isidentifier()
        assert check.rule.endswith(".")


def test_sdpa_gets_about_a_hundred_tests_or_more() -> None:
    ids = [f"{trial.check.name}[{trial.id}]" for trial in plan_suite(SdpaAttention)]
    assert len(set(ids)) == len(ids) >= 80


SUITE = """
from backend_zoo.results import NoWindow
from backend_zoo.sound import SoundAttention
from inference_shardformer.conformance import backend_suite

TestSound = backend_suite(SoundAttention)
TestNoWindow = backend_suite(NoWindow, make=lambda spec: NoWindow(spec))
"""


def test_pytest_runs_a_suite(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(SUITE)
    result = pytester.runpytest("-v", "--strict-markers", "-m", "conformance", "-k", "window or alone or named")
    result.stdout.fnmatch_lines(
        [
            "*::TestSound::test_named_batches[[]cpu-float32-ragged_decodes[]] PASSED*",
            "*::TestNoWindow::test_named_batches[[]cpu-float32-ragged_decodes[]] PASSED*",
            "*::TestNoWindow::test_sliding_window[[]cpu-float32-window_8[]] FAILED*",
            "*ConformanceFailure: attend differs from dense attention: off by up to * tokens are wrong*",
        ]
    )
    result.stdout.fnmatch_lines_random(
        ["*::TestSound: at most *% of the tolerance, in *; alone and in company bit-identical: cpu-float32 7 of 7, *"]
    )
    assert result.ret == pytest.ExitCode.TESTS_FAILED


def test_without_v_there_is_no_summary(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(SUITE)
    result = pytester.runpytest("-k", "TestSound and company")
    result.assert_outcomes(passed=2)
    result.stdout.no_fnmatch_line("*conformance of attention backends*")


def test_the_plugin_costs_nothing_where_it_is_not_used() -> None:
    script = (
        "import sys, inference_shardformer.conformance.plugin\n"
        "sys.exit(', '.join({'torch', 'numpy', 'transformers', 'pytest'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_package_has_the_two_names_it_shows() -> None:
    import inference_shardformer.conformance as kit

    assert all(callable(getattr(kit, name)) for name in kit.__all__)
    with pytest.raises(AttributeError, match="no attribute 'frontend_suite'"):
        kit.frontend_suite  # noqa: B018


def test_features_without_a_declaration_make_no_trials() -> None:
    facts = replace(SoundAttention.capabilities, features=frozenset({Feature.SINKS}))
    plain = type("Plain", (SoundAttention,), {"capabilities": facts})
    names = {trial.check.name for trial in plan_suite(plain)}
    assert not names & {"sliding_window", "softcap", "kv_dtypes", "graphs"}
    batches = [trial.id for trial in plan_suite(plain) if trial.check.name == "named_batches"]
    assert not [name for name in batches if "mixed" in name or "chunk" in name]
    assert not run_suite(plain, without=SLOW).failures
