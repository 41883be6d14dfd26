"""Products of sorted rows with the weights of several experts, in one launch that waits for nothing."""

from __future__ import annotations

from typing import NamedTuple

import torch

from inference_shardformer.kernels.triton.experts_kernel import experts_kernel
from inference_shardformer.kernels.triton.shapes import power_of_two

_FEWEST_ROWS, _MOST_ROWS = 16, 64  # of a tile; the matrix units take sixteen
_BLOCK_N = 64
_BLOCK_K_BYTES = 128


class ExpertWeights(NamedTuple):
    """Where the weights of all experts lie; they must stay there. `addresses` is int64 `[num_experts]`."""

    addresses: torch.Tensor
    out_features: int
    in_features: int
    is_aligned: bool  # all addresses are multiples of 16


class SortedRows(NamedTuple):
    """Rows in the order of their experts: `rows` int64 `[num_rows]` of the input, `ends` int32 `[num_experts]`."""

    rows: torch.Tensor
    ends: torch.Tensor


def expert_weights(weights: list[torch.Tensor]) -> ExpertWeights:
    """Of one weight `[out_features, in_features]` for each expert, all alike and contiguous."""
    first = weights[0]
    wrong = [each for each in weights if each.shape != first.shape or each.dtype != first.dtype]
    if wrong or not all(each.is_contiguous() and each.device == first.device for each in weights):
        shapes = sorted({f"{each.dtype} {tuple(each.shape)}" for each in weights})
        raise ValueError(f"the weights of all experts must be alike and contiguous on one device, not {shapes}")
    pointers = [each.data_ptr() for each in weights]
    addresses = torch.tensor(pointers, dtype=torch.int64, device=first.device)
    out_features, in_features = first.shape
    return ExpertWeights(addresses, out_features, in_features, all(pointer % 16 == 0 for pointer in pointers))


def sort_by_expert(chosen: torch.Tensor, num_experts: int) -> tuple[SortedRows, torch.Tensor]:
    """Choices `[num_tokens, top_k]`, each a row, in the order of their experts; and where each choice stands in it.

    The places are int64 `[num_tokens * top_k]`. Stable, so that nothing depends on chance.
    """
    flat = chosen.flatten()
    order = flat.argsort(stable=True)
    places = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    counts = torch.zeros(num_experts, dtype=torch.int32, device=flat.device)
    counts.scatter_add_(0, flat, torch.ones_like(flat, dtype=torch.int32))
    return SortedRows(order // chosen.shape[1], counts.cumsum(0, dtype=torch.int32)), places


def multiply(x: torch.Tensor, weights: ExpertWeights, rows: SortedRows) -> torch.Tensor:
    """`x[rows] @ weight of the row's expert .T`: `[any, in_features]` to `[num_rows, out_features]`."""
    num_rows, num_experts = len(rows.rows), len(weights.addresses)
    out = torch.empty(num_rows, weights.out_features, dtype=x.dtype, device=x.device)
    if not num_rows:
        return out
    x = x if x.stride(1) == 1 else x.contiguous()
    block_m = min(max(power_of_two(-(-num_rows // num_experts)), _FEWEST_ROWS), _MOST_ROWS)
    most_tiles = num_rows // block_m + min(num_experts, num_rows)
    experts_kernel[(-(-weights.out_features // _BLOCK_N), most_tiles)](
        *(out, x, rows.rows, rows.ends, weights.addresses, x.stride(0)),
        NUM_EXPERTS=num_experts,
        EXPERTS_PAD=power_of_two(num_experts),
        OUT_FEATURES=weights.out_features,
        IN_FEATURES=weights.in_features,
        ALIGNED=weights.is_aligned,
        BLOCK_M=block_m,
        BLOCK_N=_BLOCK_N,
        BLOCK_K=min(_BLOCK_K_BYTES // x.dtype.itemsize, max(power_of_two(weights.in_features), 16)),
        num_warps=4,
    )
    return out
