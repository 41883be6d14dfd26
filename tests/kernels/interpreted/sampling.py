"""Triton's sampling kernel against its twin and the engine's own distribution, in Triton's interpreter.

Not collected by its name: `test_triton_interpreted.py` runs it in a process of its own.
"""

from __future__ import annotations

import pytest
import torch

from inference_shardformer.engine import distribution
from inference_shardformer.kernels import reference_sampling
from inference_shardformer.kernels.triton.sampling import sample

SETTINGS = [
    (1.0, 0, 1.0),
    (0.7, 5, 1.0),
    (1.3, 0, 0.8),
    (1.0, 50, 0.9),
    (2.0, 1, 0.5),
    (0.5, 3, 0.01),
    (1.0, 9999, 1.0),
]


def make(settings: list[tuple[float, int, float]]) -> dict[str, torch.Tensor]:
    temperatures, top_ks, top_ps = zip(*settings, strict=True)
    return {
        "temperatures": torch.tensor(temperatures, dtype=torch.float32),
        "top_ks": torch.tensor(top_ks, dtype=torch.int32),
        "top_ps": torch.tensor(top_ps, dtype=torch.float64),
    }


@pytest.mark.parametrize("vocab_size", [1, 7, 300, 4500])
def test_rows_of_all_settings(vocab_size):
    gen = torch.Generator().manual_seed(vocab_size)
    logits = 3 * torch.randn(len(SETTINGS), vocab_size, generator=gen)
    uniforms = torch.rand(len(SETTINGS), generator=gen, dtype=torch.float64)
    given = make(SETTINGS) | {"uniforms": uniforms}
    ids = sample(logits, **given)
    assert ids.dtype == torch.int64
    assert torch.equal(ids, reference_sampling.sample(logits, **given))
    names = ("temperatures", "top_ks", "top_ps")
    settings = dict(zip(names, (list(each) for each in zip(*SETTINGS, strict=True)), strict=True))
    assert torch.equal(ids, distribution.drawn(logits, **settings, uniforms=uniforms.tolist()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_equal_scores_are_kept_by_top_k_together_and_by_top_p_from_the_lowest_id_on(dtype):
    logits = torch.tensor([1.0, 3.0, 2.0, 2.0, 0.0, 2.0, -torch.inf, 2.0]).to(dtype)
    draws = [index / 12 for index in range(12)]
    given = {"uniforms": torch.tensor(draws, dtype=torch.float64)}
    rows = logits.expand(12, -1)
    by_k = sample(rows, **make([(1.0, 2, 1.0)] * 12), **given)
    assert set(by_k.tolist()) == {1, 2, 3, 5, 7}
    by_p = sample(rows, **make([(1.0, 0, 0.6)] * 12), **given)
    assert set(by_p.tolist()) == {1, 2, 3}
    assert torch.equal(by_p, reference_sampling.sample(rows, **make([(1.0, 0, 0.6)] * 12), **given))


def test_temperature_0_takes_the_first_of_the_likeliest_and_the_ends_of_the_draw_are_tokens():
    logits = torch.tensor([[0.0, 5.0, 5.0, -torch.inf]])
    greedy = {"uniforms": torch.tensor([0.999], dtype=torch.float64), **make([(0.0, 0, 0.1)])}
    assert sample(logits, **greedy).tolist() == [1]
    for uniform, token in ((0.0, 0), (1 - 2.0**-52, 2)):
        ends = {"uniforms": torch.tensor([uniform], dtype=torch.float64), **make([(1.0, 0, 1.0)])}
        assert sample(logits, **ends).tolist() == [token]
    assert sample(logits[:0], **{name: value[:0] for name, value in greedy.items()}).shape == (0,)


def test_draws_follow_the_distribution():
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0]).expand(40, -1)
    uniforms = (torch.arange(40, dtype=torch.float64) + 0.5) / 40
    ids = sample(logits, **make([(1.0, 0, 1.0)] * 40), uniforms=uniforms)
    shares = torch.bincount(ids, minlength=4) / 40
    assert (shares - logits[0].softmax(0)).abs().max() <= 1 / 40
