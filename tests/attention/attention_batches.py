"""The table of named batches that every backend serves, and the dense oracle that knows nothing of pages."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from inference_shardformer.attention.base import AttentionBackend, AttentionSpec, RaggedBatch
from inference_shardformer.kv_cache.cache import PagedKVCache
from inference_shardformer.kv_cache.spec import KVCacheSpec


@dataclass(frozen=True)
class Case:
    """Sequences as (tokens already cached, tokens of this step), decodes first, and the shape they run at."""

    sequences: tuple[tuple[int, int], ...]
    num_heads: int = 6
    num_kv_heads: int = 2
    head_dim: int = 16
    block_size: int = 16
    window: int | None = None

    def spec(self, dtype: torch.dtype, device: str = "cpu") -> AttentionSpec:
        """The case as facts for a backend; the scale is not the usual one, so that ignoring it shows."""
        return AttentionSpec(
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            scale=0.31,
            dtype=dtype,
            device=torch.device(device),
            block_size=self.block_size,
            sliding_window=self.window,
        )


RAGGED_DECODES = tuple((past, 1) for past in (40, 3, 130, 17, 64, 0, 5, 41, 99, 12, 31, 300))
MIXED = ((20, 1), (7, 1), (33, 1), (0, 19), (16, 9), (0, 2), (48, 16))

CASES = {
    "empty": Case(()),
    "single_decode": Case(((37, 1),)),
    "first_token_alone": Case(((0, 1),)),
    "equal_decodes": Case(((31, 1),) * 5),
    "ragged_decodes": Case(RAGGED_DECODES),
    "single_prefill": Case(((0, 23),)),
    "ragged_prefill": Case(((0, 5), (0, 33), (0, 16), (0, 2))),
    "chunked_prefill": Case(((8, 8), (21, 5), (64, 30))),
    "mixed": Case(MIXED),
    "block_boundaries": Case(((14, 1), (15, 1), (16, 1), (31, 1), (0, 15), (0, 16), (0, 17), (16, 16), (15, 17))),
    "long_context": Case(((2600, 1), (30, 1), (1100, 40)), num_heads=2, num_kv_heads=1, head_dim=8),
    "mha": Case(MIXED, num_heads=3, num_kv_heads=3),
    "gqa_2": Case(MIXED, num_heads=4, num_kv_heads=2),
    "gqa_8": Case(MIXED, num_heads=16, num_kv_heads=2),
    "mqa": Case(MIXED, num_heads=5, num_kv_heads=1),
    "block_size_1": Case(MIXED, block_size=1),
    "block_size_5": Case(MIXED, block_size=5),
    "block_size_32": Case(MIXED, block_size=32),
    "odd_head_dim": Case(MIXED, head_dim=20),
    "window_1": Case(MIXED, window=1),
    "window_8": Case(MIXED, window=8),
    "window_of_a_block": Case((*RAGGED_DECODES, (0, 40), (20, 20)), window=16),
    "window_wider_than_all": Case(MIXED, window=1000),
}

TOLERANCES = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@dataclass
class PagedProblem:
    """A case with tensors: what a backend is given, and the dense keys and values that it must behave like.

    Every slot that no sequence owns holds NaN, block 0 included; blocks are handed out in shuffled order.
    """

    spec: AttentionSpec
    batch: RaggedBatch
    kv_cache: PagedKVCache
    q: torch.Tensor  # [num_tokens, num_heads, head_dim]
    k: torch.Tensor  # [num_tokens, num_kv_heads, head_dim], this step's
    v: torch.Tensor  # [num_tokens, num_kv_heads, head_dim], this step's
    dense: list[tuple[torch.Tensor, torch.Tensor]]  # keys and values of each whole sequence

    def run(self, backend: AttentionBackend) -> torch.Tensor:
        """Plan, write and attend one layer."""
        layer = self.kv_cache.layer(0)
        meta = backend.plan(self.batch, self.kv_cache)
        backend.write(self.k, self.v, layer, meta)
        return backend.attend(self.q, layer, meta)


def make_problem(case: Case, dtype: torch.dtype, *, device: str = "cpu", seed: int = 0) -> PagedProblem:
    """Random tensors for a case; past keys and values lie in the cache, this step's do not yet."""
    gen = torch.Generator().manual_seed(seed)
    spec, size = case.spec(dtype, device), case.block_size
    seq_lens = [past + new for past, new in case.sequences]
    needed = [-(-seq_len // size) for seq_len in seq_lens]
    shuffled = (torch.randperm(sum(needed) + 2, generator=gen) + 1).tolist()
    blocks = [[shuffled.pop() for _ in range(count)] for count in needed]
    kv_spec = KVCacheSpec(1, case.num_kv_heads, case.head_dim, size, dtype)
    kv_cache = PagedKVCache(kv_spec, num_blocks=sum(needed) + 3, device=torch.device(device))
    for tensor in kv_cache.layer(0):
        tensor.fill_(torch.nan)
    dense, new_kv, slot_mapping = [], [], []
    for (past, _), seq_len, owned in zip(case.sequences, seq_lens, blocks, strict=True):
        kv = torch.randn(2, seq_len, case.num_kv_heads, case.head_dim, generator=gen).to(dtype)
        slots = [owned[i // size] * size + i % size for i in range(seq_len)]
        for tensor, values in zip(kv_cache.layer(0), kv, strict=True):
            tensor.view(-1, *values.shape[1:])[slots[:past]] = values[:past].to(device)
        dense.append((kv[0], kv[1]))
        new_kv.append(kv[:, past:])
        slot_mapping += slots[past:]
    no_kv = torch.empty(2, 0, case.num_kv_heads, case.head_dim, dtype=dtype)
    k, v = torch.cat([no_kv, *new_kv], dim=1).to(device)
    q = torch.randn(len(slot_mapping), case.num_heads, case.head_dim, generator=gen).to(dtype).to(device)
    batch = _batch([new for _, new in case.sequences], seq_lens, blocks, slot_mapping, device)
    return PagedProblem(spec=spec, batch=batch, kv_cache=kv_cache, q=q, k=k, v=v, dense=dense)


def _batch(
    query_lens: list[int], seq_lens: list[int], blocks: list[list[int]], slot_mapping: list[int], device: str
) -> RaggedBatch:
    tables = torch.zeros(len(blocks), max(map(len, blocks), default=1), dtype=torch.int32)
    for row, owned in zip(tables, blocks, strict=True):
        row[: len(owned)] = torch.tensor(owned)
    starts = torch.tensor([0, *query_lens]).cumsum(0).int()
    return RaggedBatch(
        cu_seqlens_q=starts.to(device),
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32, device=device),
        block_tables=tables.to(device),
        slot_mapping=torch.tensor(slot_mapping, dtype=torch.int64, device=device),
        host_query_lens=query_lens,
        host_seq_lens=seq_lens,
        num_decodes=query_lens.count(1),
    )


def dense_attention(problem: PagedProblem) -> torch.Tensor:
    """fp64 softmax attention, one query and one head at a time, over keys and values that were never paged."""
    spec, start = problem.spec, 0
    out = torch.zeros(problem.q.shape, dtype=torch.float64)
    q = problem.q.double().cpu()
    for query_len, (keys, values) in zip(problem.batch.host_query_lens, problem.dense, strict=True):
        for i in range(query_len):
            position = len(keys) - query_len + i
            oldest = 0 if spec.sliding_window is None else max(0, position + 1 - spec.sliding_window)
            for head in range(spec.num_heads):
                kv_head = head * spec.num_kv_heads // spec.num_heads
                k = keys[oldest : position + 1, kv_head].double()
                v = values[oldest : position + 1, kv_head].double()
                out[start + i, head] = torch.softmax(k @ q[start + i, head] * spec.scale, dim=0) @ v
        start += query_len
    return out
