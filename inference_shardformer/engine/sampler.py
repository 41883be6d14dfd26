"""Sampler: one token for each row of logits whose vocabulary is sharded over the ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from inference_shardformer.compute.sampling import Draw, Greatest
from inference_shardformer.engine.distribution import drawn, drop_unlikely, uniform
from inference_shardformer.engine.history import look_back
from inference_shardformer.engine.request import SampledRow
from inference_shardformer.engine.staging import staged
from inference_shardformer.engine.wishes import add_bias, forbid_early_end, may_not_end

NOT_FINITE = -1
NOTHING_LEFT = -2
_LEAST = torch.finfo(torch.float32).tiny  # a lower temperature is 0 in float32, and draws no differently


class TensorGroup(Protocol):
    """The part of a tensor-parallel group that carries logits and token ids."""

    rank: int
    size: int
    device: torch.device

    def all_gather(self, t: torch.Tensor, dim: int = -1) -> torch.Tensor:
        """Every rank's `t`, concatenated along `dim` in rank order."""

    def broadcast(self, t: torch.Tensor, *, src: int = 0) -> torch.Tensor:
        """Rank `src`'s `t`, on every rank."""


class Sampler:
    """Chooses tokens; the same on every rank, for any number of ranks.

    This rank's logits are the columns `vocab_range` of the vocabulary, followed by padding that is never chosen.
    Greedy rows exchange one (value, index) pair; rows that draw, or whose request changes their logits, exchange them,
    and rank 0 chooses. What is given as `draw` and `greatest` does the work, else torch.
    """

    def __init__(
        self,
        group: TensorGroup,
        vocab_range: tuple[int, int],
        *,
        draw: Draw | None = None,
        greatest: Greatest | None = None,
        eos_token_ids: Sequence[int] = (),
    ) -> None:
        self._group = group
        self._eos_token_ids = eos_token_ids
        self._draw = draw or drawn
        self._greatest = greatest or _greatest
        self._start, self._end = vocab_range
        ranges = torch.tensor([vocab_range], dtype=torch.int64, device=group.device)
        self._vocab_ranges: list[list[int]] = group.all_gather(ranges, dim=0).tolist()

    def sample(self, logits: torch.Tensor, requests: Sequence[SampledRow]) -> list[int]:
        """What `sample_on_device` chooses, on the host; waits for it."""
        return self.sample_on_device(logits, requests).tolist()

    def sample_on_device(
        self,
        logits: torch.Tensor,
        requests: Sequence[SampledRow],
        greatest: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """A token id for each row of `logits` `[num_rows, local_vocab]`, int64 `[num_rows]`. Waits for nothing.

        `NOT_FINITE` where logits are NaN or inf, `NOTHING_LEFT` where the tokens so far ban all others. Rows belong to
        `requests` in order. One exchange between the ranks where all rows are greedy and no request changes its own.
        `greatest`: value and place of each row's greatest logit among this rank's columns, where they are known; the
        place is `NOT_FINITE` where the value is not finite.
        """
        if all(map(_needs_no_logits_of_others, requests)):
            return (
                self._argmax(logits, greatest) if requests else torch.empty(0, dtype=torch.int64, device=logits.device)
            )
        sharded = [row for row, request in enumerate(requests) if _needs_no_logits_of_others(request)]
        whole = [row for row, request in enumerate(requests) if not _needs_no_logits_of_others(request)]
        chosen = torch.empty(len(requests), dtype=torch.int64, device=logits.device)
        if sharded:
            rows = staged(sharded, torch.int64, logits.device)
            chosen[rows] = self._argmax(logits[rows], greatest and (greatest[0][rows], greatest[1][rows]))
        rows = staged(whole, torch.int64, logits.device)
        chosen[rows] = self._choose(logits[rows], [requests[row] for row in whole])
        return chosen

    def _argmax(self, logits: torch.Tensor, greatest: tuple[torch.Tensor, torch.Tensor] | None) -> torch.Tensor:
        """The likeliest token of each row, the lowest id among equals; int64 `[num_rows]`."""
        if greatest is None and self._start < self._end:
            value, best = self._greatest(logits[:, : self._end - self._start])
            greatest = value, best.masked_fill(~value.isfinite(), NOT_FINITE)
        if self._group.size == 1 and greatest is not None:
            return greatest[1]
        return self._argmax_over_ranks(logits, greatest)

    def _argmax_over_ranks(
        self, logits: torch.Tensor, greatest: tuple[torch.Tensor, torch.Tensor] | None
    ) -> torch.Tensor:
        """The same where each rank holds some columns, perhaps none: the ranks exchange (value, index) pairs."""
        num_rows = logits.shape[0]
        pairs = logits.new_full((num_rows, 2), -torch.inf, dtype=torch.float64)
        if greatest is not None and self._start < self._end:
            value, best = greatest
            pairs[:, 0] = value
            pairs[:, 1] = best + self._start
        gathered = self._group.all_gather(pairs, dim=0).view(-1, num_rows, 2)  # [size, num_rows, 2]
        winner = gathered[..., 0].argmax(dim=0)  # the first rank among equals, which holds the lowest ids
        value, token_id = gathered[winner, torch.arange(num_rows, device=logits.device)].unbind(-1)
        return torch.where(value.isfinite(), token_id, float(NOT_FINITE)).long()

    def _choose(self, logits: torch.Tensor, requests: Sequence[SampledRow]) -> torch.Tensor:
        """Tokens of rows whose logits rank 0 must see whole; int64 `[num_rows]`."""
        whole = self._true_columns(self._group.all_gather(logits.contiguous(), dim=-1), logits.shape[1])
        token_ids = torch.empty(len(requests), dtype=torch.int64, device=logits.device)
        if self._group.rank == 0:
            is_finite = whole.amax(dim=-1).isfinite()
            add_bias(whole, requests)
            look_back(whole, requests)
            forbid_early_end(whole, requests, self._eos_token_ids)
            greedy = [row for row, request in enumerate(requests) if request.sampling.is_greedy]
            others = [row for row, request in enumerate(requests) if not request.sampling.is_greedy]
            if greedy:
                rows = staged(greedy, torch.int64, whole.device)
                token_ids[rows] = self._greatest(whole[rows])[1]
            if others:
                rows = staged(others, torch.int64, whole.device)
                token_ids[rows] = self._drawn(whole[rows], [requests[row] for row in others])
            token_ids.masked_fill_(whole.amax(dim=-1) == -torch.inf, NOTHING_LEFT)
            token_ids.masked_fill_(~is_finite, NOT_FINITE)
        return self._group.broadcast(token_ids, src=0)

    def _drawn(self, logits: torch.Tensor, requests: Sequence[SampledRow]) -> torch.Tensor:
        """Tokens of rows that are no greedy ones, by numbers that only depend on the request."""
        samplings = [request.sampling for request in requests]
        temperatures = [max(sampling.temperature, _LEAST) for sampling in samplings]
        drop_unlikely(logits, temperatures, [sampling.min_p for sampling in samplings])
        return self._draw(
            logits,
            temperatures=temperatures,
            top_ks=[sampling.top_k for sampling in samplings],
            top_ps=[sampling.top_p for sampling in samplings],
            uniforms=[uniform(request.sampling.seed, request.num_output_tokens) for request in requests],
        )

    def _true_columns(self, gathered: torch.Tensor, local_vocab: int) -> torch.Tensor:
        """Drop each rank's padding: `[num_rows, size * local_vocab]` to `[num_rows, vocab_size]`."""
        parts = [
            gathered[:, rank * local_vocab : rank * local_vocab + end - start]
            for rank, (start, end) in enumerate(self._vocab_ranges)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def _needs_no_logits_of_others(request: SampledRow) -> bool:
    sampling = request.sampling
    if sampling.takes_likeliest:
        return True
    changes_logits = sampling.looks_back or bool(sampling.logit_bias) or may_not_end(request)
    return sampling.is_greedy and not changes_logits


def _greatest(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """On a CPU through numpy, which is a dozen times faster at this than torch."""
    best = torch.from_numpy(rows.numpy().argmax(axis=-1)) if rows.device.type == "cpu" else rows.argmax(dim=-1)
    return rows.gather(-1, best.unsqueeze(-1)).squeeze(-1), best
