"""Scorer: log-probabilities under the model, where the vocabulary is sharded over the ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from inference_shardformer.engine.sampler import TensorGroup
from inference_shardformer.engine.staging import staged

_LOW_BITS = 0x7FFFFFFF
_NO_KEY = -(2**63)
_SLAB = 2**22  # logits that are looked at together, which bounds what is allocated


class Scorer:
    """Log-softmax of rows of logits; the same on every rank, for any number of ranks.

    This rank's logits are the columns `vocab_range` of the vocabulary, followed by padding that is never seen. Logits
    are not exchanged: each rank brings the logarithm of its sum of exponentials, its likeliest tokens and the chosen
    one if it is its own, and how many are likelier than that.
    """

    def __init__(self, group: TensorGroup, vocab_range: tuple[int, int]) -> None:
        self._group = group
        self._start, self._end = vocab_range
        self._lower_halves = _LOW_BITS - torch.arange(self._start, self._end, device=group.device)

    def score_on_device(
        self, logits: torch.Tensor, rows: Sequence[int], token_ids: torch.Tensor, num_top: int
    ) -> torch.Tensor:
        """Float64 `[len(rows), 2 + 2 * num_top]` for these rows of `logits` `[num_rows, local_vocab]`.

        A row is the log-probability and the rank of `token_ids[i]` (int64 `[len(rows)]`), then the ids and then the
        log-probabilities of the `num_top` likeliest, the lower id first among equals. Log-probabilities are summed in
        float64 and rounded to float32. A row that is not finite means nothing, and so does a negative token id. Two
        exchanges between the ranks; waits for nothing.
        """
        slab = max(1, _SLAB // max(1, self._end - self._start))
        places = [staged(rows[at : at + slab], torch.int64, logits.device) for at in range(0, len(rows), slab)]
        ids = token_ids.split(slab)
        brought = torch.cat(
            [self._brought(logits[place], own, num_top) for place, own in zip(places, ids, strict=True)]
        )
        gathered = self._group.all_gather(brought, dim=0).view(-1, *brought.shape)  # [size, num_rows, 2 + num_top]
        total = gathered[..., 0].contiguous().view(torch.float64).logsumexp(dim=0)
        chosen = gathered[..., 1].amax(dim=0)
        likeliest = gathered[..., 2:].transpose(0, 1).flatten(1).topk(num_top, dim=-1).values
        ahead = torch.cat(
            [
                (self._keys(logits[place]) > key.unsqueeze(-1)).sum(dim=-1)
                for place, key in zip(places, chosen.split(slab), strict=True)
            ]
        )
        rank = self._group.all_gather(ahead, dim=0).view(-1, len(rows)).sum(dim=0) + 1
        keys = torch.cat([chosen.unsqueeze(-1), likeliest], dim=-1)
        logprobs = (_logits_of(keys).double() - total.unsqueeze(-1)).float().double()
        return torch.cat([logprobs[:, :1], rank.unsqueeze(-1), _ids_of(likeliest), logprobs[:, 1:]], dim=-1)

    def _brought(self, logits: torch.Tensor, token_ids: torch.Tensor, num_top: int) -> torch.Tensor:
        """What this rank knows, int64 `[num_rows, 2 + num_top]`: bits of a float64, then keys, the greatest first."""
        keys = self._keys(logits)
        brought = keys.new_full((len(keys), 2 + num_top), _NO_KEY)
        brought[:, 0] = self._log_of_sum(logits).view(torch.int64)
        num_columns = self._end - self._start
        if num_columns == 0:
            return brought
        places = token_ids - self._start
        is_own = (places >= 0) & (places < num_columns)
        own = keys.gather(-1, places.clamp(0, num_columns - 1).unsqueeze(-1)).squeeze(-1)
        brought[:, 1] = own.masked_fill(~is_own, _NO_KEY)
        num_known = min(num_top, num_columns)
        brought[:, 2 : 2 + num_known] = keys.topk(num_known, dim=-1).values
        return brought

    def _log_of_sum(self, logits: torch.Tensor) -> torch.Tensor:
        """Logarithm of the sum of exponentials over this rank's columns, float64 `[num_rows]`."""
        columns = logits[:, : self._end - self._start].float()
        if columns.shape[1] == 0:
            return columns.new_full((len(columns),), -torch.inf, dtype=torch.float64)
        greatest = columns.amax(dim=-1, keepdim=True)
        shift = greatest.masked_fill(greatest == -torch.inf, 0.0)
        return (columns - shift).exp().sum(dim=-1, dtype=torch.float64).log() + shift.squeeze(-1).double()

    def _keys(self, logits: torch.Tensor) -> torch.Tensor:
        """Int64 `[num_rows, num_columns]`, one for each logit and token id: the greater the likelier, none equal.

        The upper half orders as the float32 does, the lower half is the greater the lower the id.
        """
        columns = logits[:, : self._end - self._start].float() + 0.0  # -0.0 equals 0.0
        return _mirrored(columns.view(torch.int32)).long().bitwise_left_shift_(32).add_(self._lower_halves)


def _mirrored(bits: torch.Tensor) -> torch.Tensor:
    """Bits of float32 as int32 that order as the numbers do, and the other way round: negative ones run backwards."""
    return bits ^ ((bits >> 31) & _LOW_BITS)


def _logits_of(keys: torch.Tensor) -> torch.Tensor:
    return _mirrored((keys >> 32).int()).view(torch.float32)


def _ids_of(keys: torch.Tensor) -> torch.Tensor:
    return _LOW_BITS - (keys & _LOW_BITS)
