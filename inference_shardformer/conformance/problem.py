"""Problem: a case with tensors, as the engine would hand it to a backend, and what must come out."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch

from inference_shardformer.attention.base import AttentionBackend, AttentionMetadata, AttentionSpec, RaggedBatch
from inference_shardformer.conformance.cases import Case
from inference_shardformer.conformance.oracle import dense_attention
from inference_shardformer.kv_cache.cache import PagedKVCache
from inference_shardformer.kv_cache.layout import KVLayout
from inference_shardformer.kv_cache.spec import KVCacheSpec

CPU = torch.device("cpu")


@dataclass
class LayerInputs:
    """What one layer of one step is given, and the oracle's answer."""

    q: torch.Tensor  # [num_tokens, num_heads, head_dim]
    k: torch.Tensor  # [num_tokens, num_kv_heads, head_dim]
    v: torch.Tensor  # [num_tokens, num_kv_heads, head_dim]
    sinks: torch.Tensor | None  # [num_heads]
    expected: torch.Tensor  # fp64 on the CPU, [num_tokens, num_heads, head_dim]


@dataclass
class Problem:
    """A case on a device. The cache holds past tokens only; every slot that no sequence owns holds the poison."""

    spec: AttentionSpec
    batch: RaggedBatch
    kv_cache: PagedKVCache
    layers: list[LayerInputs]
    pages: _Pages

    def step(
        self, backend: AttentionBackend, meta: AttentionMetadata | None = None, layer_idx: int = 0
    ) -> torch.Tensor:
        """Plan, unless that was done, then write and attend one layer: `[num_tokens, num_heads, head_dim]`."""
        meta = backend.plan(self.batch, self.kv_cache) if meta is None else meta
        layer, cache = self.layers[layer_idx], self.kv_cache.layer(layer_idx)
        backend.write(layer.k, layer.v, cache, meta)
        if layer.sinks is None:
            return backend.attend(layer.q, cache, meta)
        return backend.attend_with_sinks(layer.q, cache, meta, layer.sinks)

    def as_nhd(self, tensor: torch.Tensor) -> torch.Tensor:
        """Keys or values of a layer as `[num_blocks, block_size, num_kv_heads, head_dim]`, a view in any layout."""
        return self.kv_cache.layouts[0].as_nhd(tensor)

    def alone(self, seq: int) -> tuple[Problem, slice]:
        """One sequence over the same cache, and the place of its tokens in the packed ones."""
        start = sum(self.batch.host_query_lens[:seq])
        tokens = slice(start, start + self.batch.host_query_lens[seq])
        layers = [
            LayerInputs(each.q[tokens], each.k[tokens], each.v[tokens], each.sinks, each.expected[tokens])
            for each in self.layers
        ]
        pages = _Pages((self.pages.sequences[seq],), [self.pages.blocks[seq]], [self.pages.slots[seq]], 0)
        return Problem(self.spec, pages.batch(self.spec.device), self.kv_cache, layers, pages), tokens


class _Pages(NamedTuple):
    """Which blocks each sequence owns, handed out in shuffled order. Block 0 is nobody's."""

    sequences: tuple[tuple[int, int], ...]
    blocks: list[list[int]]
    slots: list[list[int]]  # of every token of each sequence
    num_blocks: int

    def batch(self, device: torch.device) -> RaggedBatch:
        """A batch of its own tensors."""
        query_lens = [new for _, new in self.sequences]
        seq_lens = [past + new for past, new in self.sequences]
        tables = torch.zeros(len(self.blocks), max(map(len, self.blocks), default=1), dtype=torch.int32)
        for row, owned in zip(tables, self.blocks, strict=True):
            row[: len(owned)] = torch.tensor(owned)
        written = [slot for (past, _), slots in zip(self.sequences, self.slots, strict=True) for slot in slots[past:]]
        return RaggedBatch(
            cu_seqlens_q=torch.tensor([0, *query_lens]).cumsum(0).int().to(device),
            seq_lens=torch.tensor(seq_lens, dtype=torch.int32, device=device),
            block_tables=tables.to(device),
            slot_mapping=torch.tensor(written, dtype=torch.int64, device=device),
            host_query_lens=query_lens,
            host_seq_lens=seq_lens,
            num_decodes=query_lens.count(1),
        )


class _Blueprint(NamedTuple):
    pages: _Pages
    layers: list[LayerInputs]
    dense: list[list[tuple[torch.Tensor, torch.Tensor]]]  # per layer, keys and values of each whole sequence


def make_problem(
    case: Case,
    device: torch.device = CPU,
    *,
    num_layers: int = 1,
    poison: float = torch.nan,
    seed: int = 0,
    layout: KVLayout = KVLayout.NHD,
) -> Problem:
    """Fresh tensors for a case, the same ones each time; the same contents in every layout of the cache."""
    drawn, spec = _draw(case, num_layers, seed), case.spec(device)
    kv_spec = KVCacheSpec(num_layers, spec.num_kv_heads, spec.head_dim, spec.block_size, spec.cache_dtype)
    kv_cache = PagedKVCache(kv_spec, num_blocks=drawn.pages.num_blocks, device=device, layout=layout)
    layers = []
    for layer_idx, (layer, sequences) in enumerate(zip(drawn.layers, drawn.dense, strict=True)):
        cache = kv_cache.layer(layer_idx)
        for tensor, which in zip(cache, range(2), strict=True):
            tensor.fill_(poison)
            for (past, _), slots, kv in zip(case.sequences, drawn.pages.slots, sequences, strict=True):
                blocks, offsets = in_blocks(torch.tensor(slots[:past], dtype=torch.int64), case.block_size)
                layout.as_nhd(tensor)[blocks, offsets] = kv[which][:past].to(device, tensor.dtype)
        q, k, v = (tensor.to(device, copy=True) for tensor in (layer.q, layer.k, layer.v))
        sinks = None if layer.sinks is None else layer.sinks.to(device, copy=True)
        layers.append(LayerInputs(q, k, v, sinks, layer.expected))
    return Problem(spec, drawn.pages.batch(device), kv_cache, layers, drawn.pages)


def in_blocks(slots: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The block of each slot, and its place there."""
    return slots // block_size, slots % block_size


@lru_cache(maxsize=512)
def _draw(case: Case, num_layers: int, seed: int) -> _Blueprint:
    gen = torch.Generator().manual_seed(seed)
    size = case.block_size
    needed = [-(-(past + new) // size) for past, new in case.sequences]
    shuffled = (torch.randperm(sum(needed) + 2, generator=gen) + 1).tolist()
    blocks = [[shuffled.pop() for _ in range(count)] for count in needed]
    slots = [
        [owned[i // size] * size + i % size for i in range(past + new)]
        for (past, new), owned in zip(case.sequences, blocks, strict=True)
    ]
    pages = _Pages(case.sequences, blocks, slots, sum(needed) + 3)
    drawn = [_draw_layer(case, gen) for _ in range(num_layers)]
    return _Blueprint(pages, [inputs for inputs, _ in drawn], [dense for _, dense in drawn])


def _draw_layer(case: Case, gen: torch.Generator) -> tuple[LayerInputs, list[tuple[torch.Tensor, torch.Tensor]]]:
    """Inputs of one layer and the dense keys and values behind them, rounded to the type they are stored in."""
    spec = case.spec(CPU)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=gen).to(case.dtype)

    kv_shape = (spec.num_kv_heads, case.head_dim)
    whole = [noise(2, past + new, *kv_shape) for past, new in case.sequences]
    recent = [kv[:, past:] for kv, (past, _) in zip(whole, case.sequences, strict=True)]
    k, v = torch.cat([noise(2, 0, *kv_shape), *recent], dim=1)
    q = noise(len(k), spec.num_heads, case.head_dim)
    sinks = noise(spec.num_heads) if case.sinks else None
    stored = [kv.to(spec.cache_dtype) for kv in whole]
    dense = [(kv[0], kv[1]) for kv in stored]
    return LayerInputs(q, k, v, sinks, dense_attention(case, spec.scale, q, dense, sinks)), dense
