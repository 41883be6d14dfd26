"""Plain-torch twins of every kernel: slow, obviously right, the oracle of the others."""

from __future__ import annotations

import math
from typing import Literal

import torch

from inference_shardformer.kernels.e4m3 import E4M3, LARGEST_E4M3, SMALLEST_ROW, as_indexed, to_stored


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
        k_cache[slot // block_size, slot % block_size] = to_stored(k[token], k_cache.dtype)
        v_cache[slot // block_size, slot % block_size] = to_stored(v[token], v_cache.dtype)


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
    found = as_indexed(cache)[block_table[positions // block_size].long(), positions % block_size]
    return found.view(cache.dtype)


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


def rms_norm(
    x: torch.Tensor,  # [..., size]
    weight: torch.Tensor,  # [size]
    eps: float,
    *,
    residual: torch.Tensor | None = None,  # [..., size], changed in place
    weight_offset: float = 0.0,
    rounds_before_weight: bool = False,
) -> torch.Tensor:
    """`x / sqrt(mean(x^2) + eps) * (weight + weight_offset)` over the last axis; shape and type of `x`.

    With a residual, `residual += x` is normalised instead. `rounds_before_weight` rounds the normalised value to the
    type of `x` before it meets the weight, as Hugging Face's LLaMA does.
    """
    wide = _plus(residual, x).to(_wide(x.dtype))
    normed = wide * torch.rsqrt(wide.pow(2).mean(dim=-1, keepdim=True) + eps)
    if rounds_before_weight:
        normed = normed.to(x.dtype).to(wide.dtype)
    return (normed * (weight.to(wide.dtype) + weight_offset)).to(x.dtype)


def layer_norm(
    x: torch.Tensor,  # [..., size]
    weight: torch.Tensor | None,  # [size]
    bias: torch.Tensor | None,  # [size]
    eps: float,
    *,
    residual: torch.Tensor | None = None,  # [..., size], changed in place
) -> torch.Tensor:
    """`(x - mean(x)) / sqrt(var(x) + eps) * weight + bias` over the last axis; with a residual, of `residual += x`."""
    wide = _plus(residual, x).to(_wide(x.dtype))
    centred = wide - wide.mean(dim=-1, keepdim=True)
    normed = centred * torch.rsqrt(centred.pow(2).mean(dim=-1, keepdim=True) + eps)
    if weight is not None:
        normed = normed * weight.to(wide.dtype)
    if bias is not None:
        normed = normed + bias.to(wide.dtype)
    return normed.to(x.dtype)


def _plus(residual: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    """What is normalised: `x`, or the residual after `x` was added to it in place."""
    return x if residual is None else residual.add_(x)


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


def gelu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """`gelu(gate) * up` of `[..., 2 * size]`, gate first, by gelu's tanh form; returns `[..., size]`."""
    gate, up = gate_up.to(_wide(gate_up.dtype)).chunk(2, dim=-1)
    inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate.pow(3))
    return (0.5 * gate * (1 + torch.tanh(inner)) * up).to(gate_up.dtype)


def add(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`a + b`, rounded once."""
    return (a.to(_wide(a.dtype)) + b.to(_wide(a.dtype))).to(a.dtype)


def rotary_and_write_kv(
    qkv: torch.Tensor,  # [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim]
    k_cache: torch.Tensor,  # [num_blocks, block_size, num_kv_heads, head_dim], changed in place
    v_cache: torch.Tensor,  # like k_cache, changed in place
    slot_mapping: torch.Tensor,  # [num_tokens], slot = block_id * block_size + offset; negative: not stored
    *,
    cos: torch.Tensor,  # [num_tokens, rotary_dim], both halves hold the same angles
    sin: torch.Tensor,  # [num_tokens, rotary_dim]
    layout: Literal["NHD", "HND"] = "NHD",
) -> torch.Tensor:
    """Rotate queries and keys, store keys and values, and return the queries `[num_tokens, num_heads, head_dim]`.

    Only the first `rotary_dim` elements of a head turn. In layout HND the caches are
    `[num_blocks, num_kv_heads, block_size, head_dim]`.
    """
    if layout == "HND":
        k_cache, v_cache = k_cache.transpose(1, 2), v_cache.transpose(1, 2)
    num_kv_heads, head_dim, rotary_dim = k_cache.shape[2], k_cache.shape[3], cos.shape[-1]
    heads = qkv.unflatten(1, (-1, head_dim))
    q, k, v = heads.split((heads.shape[1] - 2 * num_kv_heads, num_kv_heads, num_kv_heads), dim=1)
    q, k = (torch.cat((_rotate(x[..., :rotary_dim], cos, sin), x[..., rotary_dim:]), dim=-1) for x in (q, k))
    is_stored = slot_mapping >= 0
    write_kv(k[is_stored], v[is_stored], k_cache, v_cache, slot_mapping[is_stored])
    return q


def rotary_table_and_write_kv(
    qkv: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    table: torch.Tensor,  # float32 [num_positions, rotary_dim]: cosines, then sines, of rotary_dim / 2 angles
    positions: torch.Tensor,  # [num_tokens]
    layout: Literal["NHD", "HND"] = "NHD",
) -> torch.Tensor:
    """As `rotary_and_write_kv`, with the angles of each token's position from a table."""
    cos, sin = (half.repeat(1, 2) for half in table[positions].chunk(2, dim=-1))
    return rotary_and_write_kv(qkv, k_cache, v_cache, slot_mapping, cos=cos, sin=sin, layout=layout)


def argmax(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Value in float32 and index of the greatest element of each row, the first among equals; NaN is above all."""
    values, indices = topk(x, 1)
    return values[..., 0], indices[..., 0]


def topk(x: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Values in float32 and indices of the `k` greatest of each row: best first, lower index first among equals."""
    values, indices = x.float().sort(dim=-1, descending=True, stable=True)
    return values[..., :k], indices[..., :k]


def linear(
    x: torch.Tensor,  # [..., in_features]
    weight: torch.Tensor,  # [out_features, in_features]; with an activation gate rows, then as many up rows
    *,
    bias: torch.Tensor | None = None,  # [out_features]
    residual: torch.Tensor | None = None,  # like the result
    activation: Literal["silu", "gelu_tanh"] | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """`x @ weight^T + bias + residual`, or `activation(gate) * up`, rounded once."""
    wide = _wide(x.dtype)
    out = x.to(wide) @ weight.to(wide).T
    if bias is not None:
        out = out + bias.to(wide)
    if activation is not None:
        out = silu_and_mul(out) if activation == "silu" else gelu_and_mul(out)
    if residual is not None:
        out = out + residual.to(wide)
    return out.to(out_dtype or x.dtype)


def quantize_int8(weight: torch.Tensor, group_size: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric int8 codes of `[out_features, in_features]` and float32 scales `[out_features, groups]`.

    `group_size` columns share a scale, the last ones fewer; 0: the whole row.
    """
    size = group_size or weight.shape[1]
    codes, scales = torch.empty_like(weight, dtype=torch.int8), []
    for start in range(0, weight.shape[1], size):
        group = weight[:, start : start + size].float()
        largest = group.abs().amax(dim=1, keepdim=True)
        steps = torch.full_like(largest, 127)
        scales.append(largest / steps)
        inverse = (steps / largest).clamp(max=torch.finfo(torch.float32).max)
        codes[:, start : start + size] = (group * inverse).round().clamp(-127, 127).to(torch.int8)
    return codes, torch.cat(scales, dim=1)


def dequantize_int8(codes: torch.Tensor, scales: torch.Tensor, group_size: int = 0) -> torch.Tensor:
    """The float32 weight that codes and scales stand for."""
    size = group_size or codes.shape[1]
    return codes.float() * scales.repeat_interleave(size, dim=1)[:, : codes.shape[1]]


def quantize_e4m3(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 codes of `[num_rows, size]` and float32 scales `[num_rows, 1]`: a row's largest element becomes 448."""
    wide = x.float()
    scales = wide.abs().amax(dim=1, keepdim=True).clamp_min(SMALLEST_ROW) / LARGEST_E4M3
    return (wide / scales).to(E4M3), scales


def dequantize_e4m3(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The float32 matrix that codes and scales stand for."""
    return codes.float() * scales


def embedding(ids: torch.Tensor, weight: torch.Tensor, first: int = 0) -> torch.Tensor:
    """Rows of `weight`, which holds the ids from `first` on; zeros for ids that it does not hold."""
    rows = ids - first
    is_held = (rows >= 0) & (rows < len(weight))
    return weight[rows.clamp(0, len(weight) - 1)] * is_held[..., None]
