"""Plain-torch twins of every kernel: slow, obviously right, the oracle of the others."""

from __future__ import annotations

import torch


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The type the maths is done in: one step wider than the data."""
    return torch.float32 if dtype.itemsize < 4 else torch.float64


def write_kv(
    k: torch.Tensor,  # [num_tokens, num_kv_heads, head_dim]
    v: torch.Tensor,  # [num_tokens, num_kv_heads, head_dim]
    k_cache: torch.Tensor,  # [num_blocks, block_size, num_kv_heads, head_dim], changed in place
    v_cache: torch.Tensor,  # [num_blocks, block_size, num_kv_heads, head_dim], changed in place
    slot_mapping: torch.Tensor,  # [num_tokens], slot = block_id * block_size + offset
) -> None:
    """Store each token's key and value at its slot."""
    block_size = k_cache.shape[1]
    for token, slot in enumerate(slot_mapping.tolist()):
        k_cache[slot // block_size, slot % block_size] = k[token]
        v_cache[slot // block_size, slot % block_size] = v[token]


def paged_attention(
    q: torch.Tensor,  # [num_tokens, num_heads, head_dim]
    k_cache: torch.Tensor,  # [num_blocks, block_size, num_kv_heads, head_dim]
    v_cache: torch.Tensor,  # [num_blocks, block_size, num_kv_heads, head_dim]
    *,
    cu_seqlens_q: torch.Tensor,  # [num_seqs + 1]
    seq_lens: torch.Tensor,  # [num_seqs]
    block_tables: torch.Tensor,  # [num_seqs, max_blocks]
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,  # [num_heads]
) -> torch.Tensor:
    """Causal attention of packed queries to their sequences' paged keys and values; shape and type of `q`.

    `softcap` squashes scaled scores to `softcap * tanh(score / softcap)`; `sinks` are logits that take part in the
    softmax and add no value.
    Reads only the slots below `seq_lens`, so whatever lies in other slots cannot leak into the result.
    """
    starts = cu_seqlens_q.tolist()
    out = torch.empty_like(q)
    for seq, seq_len in enumerate(seq_lens.tolist()):
        start, end = starts[seq], starts[seq + 1]
        positions = torch.arange(seq_len, device=q.device)
        keys = _gather(k_cache, block_tables[seq], positions)
        values = _gather(v_cache, block_tables[seq], positions)
        query_positions = positions[seq_len - (end - start) :, None]  # [query_len, 1]
        visible = positions <= query_positions  # [query_len, seq_len]
        if sliding_window is not None:
            visible &= positions > query_positions - sliding_window
        out[start:end] = _attend(q[start:end], keys, values, visible, scale, softcap, sinks)
    return out


def _gather(cache: torch.Tensor, block_table: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """One sequence's keys or values in order of position: `[seq_len, num_kv_heads, head_dim]`."""
    block_size = cache.shape[1]
    return cache[block_table[positions // block_size].long(), positions % block_size]


def _attend(
    q: torch.Tensor,  # [query_len, num_heads, head_dim]
    k: torch.Tensor,  # [seq_len, num_kv_heads, head_dim]
    v: torch.Tensor,  # [seq_len, num_kv_heads, head_dim]
    visible: torch.Tensor,  # bool [query_len, seq_len]
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Softmax attention of one sequence, written out."""
    wide = _wide(q.dtype)
    group = q.shape[1] // k.shape[1]
    keys = k.to(wide).repeat_interleave(group, dim=1)
    values = v.to(wide).repeat_interleave(group, dim=1)
    scores = torch.einsum("qhd,khd->hqk", q.to(wide), keys) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible, float("-inf"))
    if sinks is not None:
        scores = torch.cat((scores, sinks.to(wide)[:, None, None].expand(-1, len(q), 1)), dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., : len(k)]
    return torch.einsum("hqk,khd->qhd", weights, values).to(q.dtype)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last axis; shape and type of `x`."""
    wide = x.to(_wide(x.dtype))
    normed = wide * torch.rsqrt(wide.pow(2).mean(dim=-1, keepdim=True) + eps)
    return (normed * weight.to(wide.dtype)).to(x.dtype)


def apply_rotary(
    q: torch.Tensor,  # [num_tokens, num_heads, head_dim]
    k: torch.Tensor,  # [num_tokens, num_kv_heads, head_dim]
    cos: torch.Tensor,  # [num_tokens, head_dim], both halves hold the same angles
    sin: torch.Tensor,  # [num_tokens, head_dim]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate queries and keys; element `i` pairs with element `i + head_dim / 2`."""
    return _rotate(q, cos, sin), _rotate(k, cos, sin)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    wide = x.to(_wide(x.dtype))
    first, second = wide.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (wide * cos[:, None].to(wide.dtype) + turned * sin[:, None].to(wide.dtype)).to(x.dtype)


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """`silu(gate) * up` of `[..., 2 * size]`, gate first; returns `[..., size]`."""
    gate, up = gate_up.to(_wide(gate_up.dtype)).chunk(2, dim=-1)
    return (gate * torch.sigmoid(gate) * up).to(gate_up.dtype)
