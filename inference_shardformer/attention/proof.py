"""The proof of a backend: one small ragged batch at the real shapes, compared with the reference kernels."""

from __future__ import annotations

from typing import NamedTuple

import torch

from inference_shardformer.attention.base import AttentionBackend, AttentionSpec, RaggedBatch
from inference_shardformer.errors import BackendUnavailableError, InferenceShardformerError
from inference_shardformer.kernels import reference
from inference_shardformer.kv_cache.cache import PagedKVCache
from inference_shardformer.kv_cache.spec import KVCacheSpec

# Wide enough for TF32 and for other orders of summation, far below what a wrong key, scale or mask changes.
TOLERANCES = {torch.float32: 2e-3, torch.float16: 1e-2, torch.bfloat16: 4e-2}
_REMEDY = "choose another attention.backend, and report this with the versions of torch and of the backend"


class _Trial(NamedTuple):
    batch: RaggedBatch
    kv_cache: PagedKVCache  # holds the past tokens only
    q: torch.Tensor  # [num_tokens, num_heads, head_dim]
    k: torch.Tensor  # [num_tokens, num_kv_heads, head_dim]
    v: torch.Tensor  # [num_tokens, num_kv_heads, head_dim]


def prove(backend: AttentionBackend, spec: AttentionSpec) -> None:
    """Run decodes, a prefill and a chunk with past tokens; needs no weights and leaves no state.

    Raises `BackendUnavailableError` with what differed, or with the failure as its cause.
    """
    with torch.inference_mode():
        trial = _make_trial(spec)
        expected = _expected(trial, spec)
        try:
            out = _run(backend, trial)
        except InferenceShardformerError:
            raise
        except Exception as exc:  # a backend's library may raise anything
            message = f"attention backend {backend.name!r} failed its proof run: {type(exc).__name__}: {exc}"
            raise BackendUnavailableError(message, remedy=_REMEDY) from exc
        difference = _difference(out, expected, TOLERANCES[spec.dtype], trial.batch)
    if difference:
        message = f"attention backend {backend.name!r} differs from the reference: {difference}"
        raise BackendUnavailableError(message, remedy=_REMEDY)


def _run(backend: AttentionBackend, trial: _Trial) -> torch.Tensor:
    layer = trial.kv_cache.layer(0)
    meta = backend.plan(trial.batch, trial.kv_cache)
    backend.write(trial.k, trial.v, layer, meta)
    return backend.attend(trial.q, layer, meta)


def _expected(trial: _Trial, spec: AttentionSpec) -> torch.Tensor:
    keys, values = (tensor.clone() for tensor in trial.kv_cache.layer(0))
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
    )


def _make_trial(spec: AttentionSpec) -> _Trial:
    """Two decodes (one just past a block's end), a prefill and a chunk, over blocks out of order."""
    query_lens = [1, 1, 9, 4]
    seq_lens = [spec.block_size + 1, 3, 9, 11]
    max_blocks = max(-(-seq_len // spec.block_size) for seq_len in seq_lens)
    num_blocks = len(seq_lens) * max_blocks + 1
    tables = torch.arange(num_blocks - 1, 0, -1, dtype=torch.int32).view(len(seq_lens), max_blocks)
    slots = [
        int(tables[seq, position // spec.block_size]) * spec.block_size + position % spec.block_size
        for seq, (query_len, seq_len) in enumerate(zip(query_lens, seq_lens, strict=True))
        for position in range(seq_len - query_len, seq_len)
    ]
    kv_spec = KVCacheSpec(1, spec.num_kv_heads, spec.head_dim, spec.block_size, spec.dtype)
    kv_cache = PagedKVCache(kv_spec, num_blocks=num_blocks, device=spec.device)
    gen = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=gen).to(spec.device, spec.dtype)

    for tensor in kv_cache.layer(0):
        tensor.copy_(noise(*tensor.shape))
    batch = RaggedBatch(
        cu_seqlens_q=torch.tensor([0, *query_lens]).cumsum(0).int().to(spec.device),
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32, device=spec.device),
        block_tables=tables.to(spec.device),
        slot_mapping=torch.tensor(slots, dtype=torch.int64, device=spec.device),
        host_query_lens=query_lens,
        host_seq_lens=seq_lens,
        num_decodes=2,
    )
    tokens = len(slots)
    k, v = (noise(tokens, spec.num_kv_heads, spec.head_dim) for _ in range(2))
    return _Trial(batch, kv_cache, noise(tokens, spec.num_heads, spec.head_dim), k, v)


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
