"""Products of many rows, which are cut into blocks: each way of cutting gives what a row alone gives."""

from __future__ import annotations

import pytest
import torch

from inference_shardformer.kernels import reference
from inference_shardformer.kernels.cpu.linear import Norm, linear
from inference_shardformer.kernels.cpu.packed_weight import pack

# (m, n, k): see src/linear_blocking.h
CUTS = {
    "one_slice": (40, 96, 576),
    "slices_of_a_panel": (70, 50, 1300),
    "groups_of_panels": (100, 544, 5632),
    "rows_kept": (257, 1120, 96),
    "slices_of_rows": (290, 300, 2080),
}

pytestmark = pytest.mark.usefixtures("isa_level")


@pytest.fixture(params=CUTS.values(), ids=CUTS.keys())
def cut(request: pytest.FixtureRequest) -> tuple[int, int, int]:
    return request.param


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def test_error(cut):
    m, n, k = cut
    x, weight, bias, residual = noise(m, k), noise(n, k, seed=1), noise(n, seed=2), noise(m, n, seed=3).float()
    out = linear(x, pack(weight), bias=bias, residual=residual, out_dtype=torch.float32)
    exact = reference.linear(x.double(), weight.double(), bias=bias.double(), residual=residual.double())
    bound = (k + 8) * 2.0**-24 * (x.double().abs() @ weight.double().abs().T + bias.double().abs() + residual.abs())
    assert ((out - exact).abs() <= bound).all()


@pytest.mark.parametrize("activation", [None, "silu"])
def test_a_row_depends_on_nothing_but_itself(cut, activation):
    m, n, k = cut
    x, scale, before = noise(m, k), noise(k, seed=2), torch.get_num_threads()
    weight, norm = pack(noise(n, k, seed=1), segments=2 if activation else 1), Norm(scale, 1e-5)
    together = linear(x, weight, norm=norm, activation=activation)
    torch.set_num_threads(2 if before == 1 else 1)
    try:
        assert torch.equal(linear(x, weight, norm=norm, activation=activation), together)
    finally:
        torch.set_num_threads(before)
    for first, last in ((0, 1), (m - 1, m), (m // 2, m // 2 + 20), (3, 38)):
        few = linear(x[first:last], weight, norm=norm, activation=activation)
        assert torch.equal(few, together[first:last])
