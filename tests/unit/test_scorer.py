"""Log-probabilities against float64 log-softmax over the whole vocabulary, on any number of ranks."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from inference_shardformer.distributed.tensor_parallel import TensorParallelGroup
from inference_shardformer.engine import scorer
from inference_shardformer.engine.logprobs import TokenLogprobs, unpacked
from inference_shardformer.engine.scorer import Scorer

SINGLE = TensorParallelGroup.single(torch.device("cpu"))
TOLERANCE = 2e-6  # exponentials are those of float32


def _logits(num_rows: int, vocab_size: int, *, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * scale


def _expected(row: torch.Tensor, token_id: int, num_top: int) -> tuple[list[int], list[float]]:
    """Ids in order of their ranks, the lower one first among equals, and all log-probabilities."""
    order = sorted(range(len(row)), key=lambda i: (-float(row[i]), i))
    return order, row.double().log_softmax(dim=-1).tolist()


def _assert_right(found: TokenLogprobs, row: torch.Tensor, token_id: int, num_top: int) -> None:
    order, logprobs = _expected(row, token_id, num_top)
    possible = [each for each in order[:num_top] if logprobs[each] > -torch.inf]
    assert found.chosen.token_id == token_id
    assert found.chosen.rank == order.index(token_id) + 1
    assert [(each.token_id, each.rank) for each in found.top] == [(each, i) for i, each in enumerate(possible, 1)]
    for each in (found.chosen, *found.top):
        assert each.logprob == pytest.approx(logprobs[each.token_id], abs=TOLERANCE, rel=TOLERANCE)


def _scored(
    tiny: SimpleNamespace, logits: torch.Tensor, rows: list[int], token_ids: list[int], num_top: int, bounds: list[int]
) -> list[TokenLogprobs]:
    """What ranks say whose columns end at these bounds, all of which must say the same."""
    width = max(end - start for start, end in pairwise(bounds)) + 2

    def program(group: object) -> list[list[float]]:
        start, end = bounds[group.rank], bounds[group.rank + 1]
        local = torch.full((len(logits), width), 1000.0)
        local[:, : end - start] = logits[:, start:end]
        return Scorer(group, (start, end)).score_on_device(local, rows, torch.tensor(token_ids), num_top).tolist()

    results = tiny.run_ranks(len(bounds) - 1, program)
    assert len(set(map(str, results))) == 1  # as text: NaN equals nothing
    return [unpacked(row, token_id, num_top) for row, token_id in zip(results[0], token_ids, strict=True)]


@pytest.mark.parametrize("bounds", [[0, 53], [0, 27, 53], [0, 30, 30, 53], [0, 1, 50, 53, 53]], ids=str)
@pytest.mark.parametrize("num_top", [0, 1, 7, 53])
def test_some_rows_on_any_number_of_ranks(tiny: SimpleNamespace, bounds: list[int], num_top: int) -> None:
    logits = _logits(6, 53)
    rows, token_ids = [5, 0, 2], [52, 1, 30]
    found = _scored(tiny, logits, rows, token_ids, num_top, bounds)
    for each, row, token_id in zip(found, rows, token_ids, strict=True):
        _assert_right(each, logits[row], token_id, num_top)


@settings(max_examples=120, deadline=None)
@given(
    values=st.lists(
        st.sampled_from([-torch.inf, -3e4, -80.0, -1.0, -0.0, 0.0, 1e-30, 0.5, 80.0, 3e4]) | st.floats(-9, 9, width=32),
        min_size=1,
        max_size=24,
    ).filter(lambda values: max(values) > -torch.inf),
    cuts=st.lists(st.integers(0, 24), max_size=3),
    choice=st.integers(0, 1000),
    num_top=st.integers(0, 24),
)
def test_ties_infinities_and_uneven_ranges(
    tiny: SimpleNamespace, values: list[float], cuts: list[int], choice: int, num_top: int
) -> None:
    size = len(values)
    possible = [place for place, value in enumerate(values) if value > -torch.inf]
    token_id, num_top = possible[choice % len(possible)], min(num_top, size)
    bounds = [0, *sorted(min(cut, size) for cut in cuts), size]
    logits = torch.tensor([values])
    [found] = _scored(tiny, logits, [0], [token_id], num_top, bounds)
    _assert_right(found, logits[0], token_id, num_top)


def test_equal_logits_over_ranks_come_in_order_of_their_ids(tiny: SimpleNamespace) -> None:
    [found] = _scored(tiny, torch.zeros(1, 12), [0], [7], 5, [0, 4, 6, 12])
    assert [each.token_id for each in found.top] == [0, 1, 2, 3, 4]
    assert found.chosen.rank == 8
    assert found.chosen.logprob == pytest.approx(-torch.tensor(12.0).log().item())


def test_great_vocabulary_is_summed_to_the_last_digit(tiny: SimpleNamespace) -> None:
    logits = _logits(2, 150_001, scale=0.01)
    found = _scored(tiny, logits, [0, 1], [149_999, 3], 9, [0, 70_000, 150_001])
    for each, row, token_id in zip(found, logits, [149_999, 3], strict=True):
        _assert_right(each, row, token_id, 9)


def test_slabs_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, rows, token_ids = _logits(9, 53), list(range(9)), torch.arange(9)
    whole = Scorer(SINGLE, (0, 53)).score_on_device(logits, rows, token_ids, 4)
    monkeypatch.setattr(scorer, "_SLAB", 2 * 53)
    assert torch.equal(Scorer(SINGLE, (0, 53)).score_on_device(logits, rows, token_ids, 4), whole)


def test_a_row_is_scored_alike_alone_and_in_company() -> None:
    logits, token_ids = _logits(40, 999), torch.arange(40) * 7
    together = Scorer(SINGLE, (0, 999)).score_on_device(logits, list(range(40)), token_ids, 20)
    for row in range(40):
        alone = Scorer(SINGLE, (0, 999)).score_on_device(logits, [row], token_ids[row : row + 1], 3)
        assert torch.equal(alone[0, :5], together[row, :5])


def test_a_row_that_is_not_finite_leaves_the_others_alone(tiny: SimpleNamespace) -> None:
    logits = _logits(3, 53)
    logits[1, 5] = torch.nan
    found = _scored(tiny, logits, [0, 1, 2], [1, 2, 3], 4, [0, 27, 53])
    _assert_right(found[0], logits[0], 1, 4)
    _assert_right(found[2], logits[2], 3, 4)


def test_logits_stay_as_they_are() -> None:
    logits = _logits(3, 53)
    before = logits.clone()
    Scorer(SINGLE, (0, 50)).score_on_device(logits, [0, 1, 2], torch.tensor([0, -1, -2]), 5)
    assert torch.equal(logits, before)
