"""Tensors of e4m3: stored without overflow, and moved by index alike on every version of torch."""

from __future__ import annotations

import pytest
import torch

from inference_shardformer.kernels import reference
from inference_shardformer.kernels.e4m3 import E4M3, as_indexed, gather_rows, store_rows, to_stored
from inference_shardformer.kv_cache.cache import PagedKVCache
from inference_shardformer.kv_cache.layout import KVLayout
from inference_shardformer.kv_cache.spec import KVCacheSpec

CPU = torch.device("cpu")
VALUES = torch.tensor([0.1, -3.3, 448.0, 470.0, 1e9, -1e9, float("inf"), float("nan")])
STORED = [0.1015625, -3.25, 448.0, 448.0, 448.0, -448.0, 448.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_lies_beyond_becomes_the_largest_number(dtype) -> None:
    out = to_stored(VALUES.to(dtype), E4M3).float()
    assert out[:-1].tolist() == STORED
    assert out[-1].isnan()
    assert torch.equal(to_stored(VALUES[:6], torch.bfloat16), VALUES[:6].to(torch.bfloat16))


@pytest.mark.parametrize("dtype", [E4M3, torch.bfloat16], ids=str)
def test_rows_are_stored_and_gathered(dtype) -> None:
    target, rows = torch.zeros(6, 2, 3).to(dtype), torch.arange(12.0).view(2, 2, 3)
    store_rows(target, torch.tensor([4, 1]), rows)
    assert torch.equal(target[4].float(), rows[0])
    assert torch.equal(target[1].float(), rows[1])
    assert target.float().sum() == rows.sum()
    found = gather_rows(target, torch.tensor([1, 4, 1]), torch.bfloat16)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found.float(), rows[[1, 0, 1]])
    assert as_indexed(target).data_ptr() == target.data_ptr()


def test_the_twin_of_the_write_stores_so_too() -> None:
    keys = torch.zeros(2, 4, 1, 8).to(E4M3)
    reference.write_kv(VALUES.view(1, 1, 8), VALUES.view(1, 1, 8), keys, keys.clone(), torch.tensor([6]))
    assert keys[1, 2, 0, :7].float().tolist() == STORED


def test_a_cache_changes_its_layout() -> None:
    cache = PagedKVCache(KVCacheSpec(2, 3, 5, 4, E4M3), num_blocks=3, device=CPU)
    for layer in range(2):
        for part in cache.layer(layer):
            part.copy_(torch.randn(part.shape))
    turned = cache.converted(KVLayout.HND, [0, 2])
    assert turned.num_bytes == cache.num_bytes == 2 * 2 * 3 * 4 * 3 * 5
    for layer in range(2):
        for part, other in zip(cache.layer_as_nhd(layer), turned.layer_as_nhd(layer), strict=True):
            assert torch.equal(as_indexed(part)[[0, 2]], as_indexed(other)[[0, 2]])
            assert not other[1].float().any()
