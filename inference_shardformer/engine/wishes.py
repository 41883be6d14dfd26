"""What a request wants of certain tokens, whatever came before: a bias, and no end that comes too early."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from inference_shardformer.engine.request import SampledRow
from inference_shardformer.engine.staging import staged


def add_bias(logits: torch.Tensor, requests: Sequence[SampledRow]) -> None:
    """Add the `logit_bias` of each request to its row of `logits` `[num_rows, vocab_size]`, in place."""
    for row, request in zip(logits, requests, strict=True):
        if request.sampling.logit_bias:
            token_ids, numbers = zip(*request.sampling.logit_bias, strict=True)
            row[staged(token_ids, torch.int64, row.device)] += staged(numbers, row.dtype, row.device)


def forbid_early_end(logits: torch.Tensor, requests: Sequence[SampledRow], eos_token_ids: Sequence[int]) -> None:
    """Leave no logit to the tokens that would end a request before its `min_new_tokens`, in place."""
    for row, request in zip(logits, requests, strict=True):
        if may_not_end(request):
            sampling = request.sampling
            ending = [*sampling.stop_token_ids, *(() if sampling.ignore_eos else eos_token_ids)]
            row[staged(ending, torch.int64, row.device)] = -torch.inf


def may_not_end(request: SampledRow) -> bool:
    """Whether the next token is one of those that must not end the request."""
    return request.num_output_tokens < request.sampling.min_new_tokens
