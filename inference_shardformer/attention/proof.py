"""The proof of a backend: one small ragged batch at the real shapes, compared with the reference kernels."""

from __future__ import annotations

from itertools import chain
from typing import NamedTuple

import torch

from inference_shardformer.attention.base import AttentionBackend, AttentionSpec, Feature, KVLayout, RaggedBatch
from inference_shardformer.errors import BackendUnavailableError, InferenceShardformerError
from inference_shardformer.kernels import reference
from inference_shardformer.kv_cache.cache import PagedKVCache
from inference_shardformer.kv_cache.spec import KVCacheSpec

# Wide enough for TF32 and for other orders of summation, far below what a wrong key, scale or mask changes.
TOLERANCES = {torch.float32: 2e-3, torch.float16: 1e-2, torch.bfloat16: 4e-2}
_REMEDY = "choose another attention.backend, and report this with the versions of torch and of the backend"


class Trial(NamedTuple):
    """One ragged batch with everything that a backend reads."""

    batch: RaggedBatch
    kv_cache: PagedKVCache  # holds the past tokens only
    q: torch.Tensor  # [num_tokens, num_heads, head_dim]
    k: torch.Tensor  # [num_tokens, num_kv_heads, head_dim]
    v: torch.Tensor  # [num_tokens, num_kv_heads, head_dim]
    sinks: torch.Tensor | None  # [num_heads]


def prove(backend: AttentionBackend, spec: AttentionSpec) -> None:
    """Run decodes, a prefill and a chunk with past tokens; needs no weights and leaves no state.

    Raises `BackendUnavailableError` with what differed, or with the failure as its cause.
    """
    for sequences in _batches(spec):
        with torch.inference_mode():
            problem = _problem(backend, spec, make_trial(spec, sequences, backend.capabilities.kv_layout))
        if problem:
            message = f"attention backend {backend.name!r} differs from the reference: {problem}"
            raise BackendUnavailableError(message, remedy=_REMEDY)


def _batches(spec: AttentionSpec) -> list[list[tuple[int, int]]]:
    """Two decodes (one just past a block's end), a prompt and a chunk as (query tokens, visible tokens).

    One batch, or one for each kind where the spec does not mix them.
    """
    kinds = [[(1, spec.block_size + 1), (1, 3)], [(9, 9)], [(4, 11)]]
    if Feature.CHUNKED_PREFILL not in spec.needs:
        kinds.pop()
    return [list(chain.from_iterable(kinds))] if Feature.MIXED_BATCH in spec.needs else kinds


def _problem(backend: AttentionBackend, spec: AttentionSpec, trial: Trial) -> str | None:
    expected = expected_output(trial, spec)
    try:
        out = run_trial(backend, trial)
    except InferenceShardformerError:
        raise
    except Exception as exc:  # a backend's library may raise anything
        message = f"attention backend {backend.name!r} failed its proof run: {type(exc).__name__}: {exc}"
        raise BackendUnavailableError(message, remedy=_REMEDY) from exc
    return _difference(out, expected, TOLERANCES[spec.dtype], trial.batch)


def run_trial(backend: AttentionBackend, trial: Trial) -> torch.Tensor:
    """One step of one layer by the backend: plan, write, attend."""
    layer = trial.kv_cache.layer(0)
    meta = backend.plan(trial.batch, trial.kv_cache)
    backend.write(trial.k, trial.v, layer, meta)
    if trial.sinks is None:
        return backend.attend(trial.q, layer, meta)
    return backend.attend_with_sinks(trial.q, layer, meta, trial.sinks)


def expected_output(trial: Trial, spec: AttentionSpec) -> torch.Tensor:
    """What the reference kernels give; the trial stays as it is."""
    keys, values = trial.kv_cache.converted(KVLayout.NHD, range(trial.kv_cache.num_blocks)).layer(0)
    reference.write_kv(trial.k, trial.v, keys, values, trial.batch.slot_mapping)
    return reference.paged_attention(
        trial.q,
        keys,
        values,
        cu_seqlens_q=trial.batch.cu_seqlens_q,
        seq_lens=trial.batch.seq_lens,
        block_tables=trial.batch.block_tables,
        scale=spec.scale,
        sliding_window=spec.sliding_window,
        softcap=spec.softcap,
        sinks=trial.sinks,
    )


def make_trial(spec: AttentionSpec, sequences: list[tuple[int, int]], layout: KVLayout = KVLayout.NHD) -> Trial:
    """Tensors for the sequences, each as (query tokens, visible tokens), over blocks out of order."""
    max_blocks = max(-(-seq_len // spec.block_size) for _, seq_len in sequences)
    num_blocks = len(sequences) * max_blocks + 1
    tables = torch.arange(num_blocks - 1, 0, -1, dtype=torch.int32).view(len(sequences), max_blocks)
    slots = [
        int(tables[seq, position // spec.block_size]) * spec.block_size + position % spec.block_size
        for seq, (query_len, seq_len) in enumerate(sequences)
        for position in range(seq_len - query_len, seq_len)
    ]
    kv_spec = KVCacheSpec(1, spec.num_kv_heads, spec.head_dim, spec.block_size, spec.cache_dtype)
    kv_cache = PagedKVCache(kv_spec, num_blocks=num_blocks, device=spec.device, layout=layout)
    gen = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=gen).to(spec.device, spec.dtype)

    for tensor in kv_cache.layer(0):
        tensor.copy_(noise(*tensor.shape))
    k, v = (noise(len(slots), spec.num_kv_heads, spec.head_dim) for _ in range(2))
    return Trial(
        batch=_batch(sequences, tables, slots, spec.device),
        kv_cache=kv_cache,
        q=noise(len(slots), spec.num_heads, spec.head_dim),
        k=k,
        v=v,
        sinks=noise(spec.num_heads) if spec.sinks else None,
    )


def _batch(
    sequences: list[tuple[int, int]], tables: torch.Tensor, slots: list[int], device: torch.device
) -> RaggedBatch:
    query_lens = [query_len for query_len, _ in sequences]
    seq_lens = [seq_len for _, seq_len in sequences]
    return RaggedBatch(
        cu_seqlens_q=torch.tensor([0, *query_lens]).cumsum(0).int().to(device),
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32, device=device),
        block_tables=tables.to(device),
        slot_mapping=torch.tensor(slots, dtype=torch.int64, device=device),
        host_query_lens=query_lens,
        host_seq_lens=seq_lens,
        num_decodes=query_lens.count(1),
    )


def _difference(out: torch.Tensor, expected: torch.Tensor, tolerance: float, batch: RaggedBatch) -> str | None:
    """What is wrong with `out`, in words; `None` if it is within the tolerance everywhere."""
    if out.shape != expected.shape or out.dtype != expected.dtype:
        return f"it returned {out.dtype} {tuple(out.shape)} for {expected.dtype} {tuple(expected.shape)}"
    errors = (out.double() - expected.double()).abs().nan_to_num(nan=torch.inf)
    worst = errors.max().item()
    if worst <= tolerance:
        return None
    token, head = divmod(int(errors.amax(dim=-1).argmax()), out.shape[1])
    phase = "decode" if token < batch.num_decodes else "prefill"
    wrong = int((errors.amax(dim=(1, 2)) > tolerance).sum())
    return (
        f"by up to {worst:.3g} where {tolerance:g} is allowed, at {phase} token {token}, head {head}; "
        f"{wrong} of {len(out)} tokens are wrong"
    )
