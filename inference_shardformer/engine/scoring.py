"""Scoring: the log-probabilities that the requests of a step want, from their start on the device to the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from inference_shardformer.engine.batch import PromptRows
from inference_shardformer.engine.logprobs import TokenLogprobs, unpacked
from inference_shardformer.engine.request import Request, SampledRow
from inference_shardformer.engine.scorer import Scorer
from inference_shardformer.engine.staging import OnItsWay, staged


class Scoring:
    """That of one step. Where nobody wants any, nothing is done."""

    def __init__(self, scorer: Scorer, is_given_up: Callable[[], bool]) -> None:
        self._scorer = scorer
        self._is_given_up = is_given_up
        self._sampled: tuple[list[int], Sequence[SampledRow], OnItsWay] | None = None
        self._prompts: tuple[Sequence[PromptRows], OnItsWay] | None = None

    def start(self, rows: Sequence[SampledRow], logits: torch.Tensor, token_ids: torch.Tensor) -> None:
        """Score the tokens that the device samples, int64 `[num_rows]`, from the logits of these rows."""
        wanted = [place for place, row in enumerate(rows) if row.sampling.logprobs is not None]
        if wanted:
            num_top = max(rows[place].sampling.logprobs or 0 for place in wanted)
            chosen = token_ids[staged(wanted, torch.int64, logits.device)]
            scores = self._scorer.score_on_device(logits, wanted, chosen, num_top)
            self._sampled = wanted, rows, OnItsWay(scores, self._is_given_up)

    def start_prompts(self, prompts: Sequence[PromptRows], logits: torch.Tensor) -> None:
        """Score what prompts go on with, after the rows that are theirs."""
        rows = [row for prompt in prompts for row in range(prompt.first_row, prompt.first_row + prompt.num_rows)]
        token_ids = staged(
            [token_id for prompt in prompts for token_id in prompt.token_ids], torch.int64, logits.device
        )
        num_top = max(prompt.request.sampling.prompt_logprobs or 0 for prompt in prompts)
        scores = self._scorer.score_on_device(logits, rows, token_ids, num_top)
        self._prompts = prompts, OnItsWay(scores, self._is_given_up)

    def wait(self, token_ids: Sequence[int]) -> dict[int, TokenLogprobs]:
        """Those of the sampled tokens, which the host knows by now, by the place of their row."""
        started, self._sampled = self._sampled, None
        if started is None:
            return {}
        wanted, rows, scores = started
        return {
            place: unpacked(score, token_ids[place], rows[place].sampling.logprobs or 0)
            for place, score in zip(wanted, scores.wait_for_rows(), strict=True)
        }

    def wait_for_prompts(self) -> dict[Request, list[TokenLogprobs]]:
        """Those of the tokens of prompts, in their order."""
        started, self._prompts = self._prompts, None
        if started is None:
            return {}
        prompts, scores = started
        found = iter(scores.wait_for_rows())
        return {
            prompt.request: [
                unpacked(next(found), token_id, prompt.request.sampling.prompt_logprobs or 0)
                for token_id in prompt.token_ids
            ]
            for prompt in prompts
        }
