"""The oracle: fp64 attention over keys and values that were never paged, one query at a time.

It shares no code with the kernels and none with any backend.
"""

from __future__ import annotations

import torch

from inference_shardformer.conformance.cases import Case


def dense_attention(
    case: Case,
    scale: float,
    q: torch.Tensor,  # [num_tokens, num_heads, head_dim]
    dense: list[tuple[torch.Tensor, torch.Tensor]],  # keys and values of each whole sequence
    sinks: torch.Tensor | None,  # [num_heads]
) -> torch.Tensor:
    """What a backend must return for the case, in fp64: `[num_tokens, num_heads, head_dim]`."""
    queries, out, token = q.double(), torch.zeros(q.shape, dtype=torch.float64), 0
    owner = [head // case.gqa_ratio for head in range(q.shape[1])]  # key head of each query head
    for (_, query_len), (keys, values) in zip(case.sequences, dense, strict=True):
        for position in range(len(keys) - query_len, len(keys)):
            oldest = 0 if case.window is None else max(0, position + 1 - case.window)
            k, v = (part[oldest : position + 1].double()[:, owner] for part in (keys, values))  # [visible, heads, dim]
            weights = _softmax((k * queries[token]).sum(dim=-1) * scale, case.softcap, sinks)
            out[token] = (weights[..., None] * v).sum(dim=0)
            token += 1
    return out


def _softmax(scores: torch.Tensor, softcap: float | None, sinks: torch.Tensor | None) -> torch.Tensor:
    """Weights of `[visible, num_heads]` scores. The largest score is taken out first, as it could overflow."""
    if softcap is not None:
        scores = (scores / softcap).tanh() * softcap
    largest = scores.amax(dim=0)
    exponents = (scores - largest).exp()
    total = exponents.sum(dim=0)
    if sinks is not None:
        total = total + (sinks.double() - largest).exp()
    return exponents / total
