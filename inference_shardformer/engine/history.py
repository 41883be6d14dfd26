"""What the tokens so far do to the logits of the next one: penalties and forbidden n-grams."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from inference_shardformer.engine.request import SampledRow
from inference_shardformer.engine.staging import staged


def look_back(logits: torch.Tensor, requests: Sequence[SampledRow]) -> None:
    """Change `logits` `[num_rows, vocab_size]` in place, each row by the prompt and the output of its request.

    As in Hugging Face: the repetition penalty first, the n-grams last. A row depends on its own request alone.
    """
    for row, request in zip(logits, requests, strict=True):
        sampling = request.sampling
        if sampling.repetition_penalty != 1.0:
            _penalise(row, request.token_ids, sampling.repetition_penalty)
        if sampling.presence_penalty or sampling.frequency_penalty:
            _take_from_met(row, request.output_token_ids, sampling.presence_penalty, sampling.frequency_penalty)
        if sampling.no_repeat_ngram_size:
            banned = completing_tokens(request.token_ids, sampling.no_repeat_ngram_size).tolist()
            row[staged(banned, torch.int64, row.device)] = -torch.inf


def completing_tokens(token_ids: Sequence[int], size: int) -> np.ndarray:
    """The tokens that would complete an n-gram of `size` tokens which `token_ids` already hold; int64."""
    tokens = np.asarray(token_ids, dtype=np.int64)
    num_ngrams = len(tokens) - size + 1
    if num_ngrams <= 0:
        return np.empty(0, dtype=np.int64)
    is_met = np.ones(num_ngrams, dtype=bool)
    for offset in range(size - 1):  # token by token of the unfinished n-gram at the end
        is_met &= tokens[offset : offset + num_ngrams] == tokens[num_ngrams + offset]
    return np.unique(tokens[size - 1 :][is_met])


def _penalise(row: torch.Tensor, token_ids: Sequence[int], penalty: float) -> None:
    seen = staged(token_ids, torch.int64, row.device)  # a token that is met twice is written twice, with one value
    scores = row[seen]
    numbers = torch.finfo(row.dtype)
    penalty = min(max(penalty, numbers.tiny), numbers.max)
    row[seen] = torch.where(scores < 0, scores * penalty, scores / penalty).clamp_(numbers.min, numbers.max)


def _take_from_met(row: torch.Tensor, token_ids: Sequence[int], presence: float, frequency: float) -> None:
    met, counts = np.unique(np.asarray(token_ids, dtype=np.int64), return_counts=True)
    penalties = presence + frequency * counts
    row[staged(met.tolist(), torch.int64, row.device)] -= staged(penalties.tolist(), row.dtype, row.device)
