"""The native argmax and top-k at every level of the machine, against sorting."""

from __future__ import annotations

import pytest
import torch

from inference_shardformer.kernels import reference
from inference_shardformer.kernels.cpu import search

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NAN, INF = float("nan"), float("inf")

pytestmark = pytest.mark.usefixtures("isa_level")


@pytest.fixture(params=DTYPES)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return DTYPES[request.param]


@pytest.fixture(params=[1, 3], ids=["one thread", "three threads"])
def threads(request: pytest.FixtureRequest):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def rows_with_ties(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Few distinct values, so that nearly all are tied."""
    return torch.randint(-9, 9, shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("shape", [(1, 1), (2, 5), (4, 33), (2, 50_000), (1, 200_001), (7, 1000), (0, 9)])
def test_argmax(shape, dtype, threads):
    for x in (rows_with_ties(*shape, dtype=dtype), torch.randn(shape).to(dtype)):
        found = search.argmax(x)
        values, indices = reference.argmax(x)
        assert torch.equal(found.indices, indices)
        assert torch.equal(found.values, values)


@pytest.mark.parametrize("place", [0, 20, 49_999, 120_000])
def test_argmax_finds_nan(place, dtype, threads):
    x = torch.randn(2, 120_001).to(dtype)
    x[1, place] = NAN
    x[1, 120_000] = NAN
    found = search.argmax(x)
    assert found.indices[1] == place
    assert found.values.isnan().tolist() == [False, True]
    assert found.indices[0] == x[0].argmax()


@pytest.mark.parametrize("fill", [-INF, INF, 0.0])
def test_argmax_of_equals_is_the_first(fill, dtype, threads):
    found = search.argmax(torch.full((1, 100_000), fill, dtype=dtype))
    assert found.indices.tolist() == [0]
    assert found.values.tolist() == [fill]


def test_argmax_ignores_the_sign_of_zero(dtype):
    x = torch.full((1, 100), -1.0, dtype=dtype)
    x[0, 40], x[0, 60] = -0.0, 0.0
    assert search.argmax(x).indices.tolist() == [40]
    assert search.topk(x, 3).indices.tolist() == [[40, 60, 0]]


@pytest.mark.parametrize(("shape", "k"), [((1, 1), 1), ((3, 5), 5), ((4, 33), 7), ((2, 50_000), 50), ((2, 3000), 3000)])
def test_topk(shape, k, dtype, threads):
    for x in (
        rows_with_ties(*shape, dtype=dtype),
        torch.randn(shape).to(dtype),
        torch.arange(shape[1]).expand(shape).to(dtype),
    ):
        found = search.topk(x.contiguous(), k)
        values, indices = reference.topk(x, k)
        assert torch.equal(found.indices, indices)
        assert torch.equal(found.values, values)


def test_topk_puts_nan_first(dtype):
    x = torch.randn(1, 200).to(dtype)
    x[0, [150, 3, 90]] = NAN
    x[0, 77] = INF
    assert search.topk(x, 4).indices.tolist() == [[3, 90, 150, 77]]


def test_rows_apart(dtype):
    wide = torch.randn(4, 300).to(dtype)
    part = wide[:, 20:220]
    assert torch.equal(search.argmax(part).indices, part.float().argmax(-1))
    assert torch.equal(search.topk(part, 5).indices, search.topk(part.contiguous(), 5).indices)


@pytest.mark.parametrize("k", [0, 9])
def test_an_impossible_k(k):
    with pytest.raises(ValueError, match=f"k={k} is not between 1 and the 8"):
        search.topk(torch.ones(2, 8), k)


def test_no_columns():
    with pytest.raises(ValueError, match="no columns"):
        search.argmax(torch.ones(2, 0))
