"""StepRunner: a scheduled step on the device, from its batch to its sampled tokens, and host work meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from inference_shardformer.config.inference import SchedulerConfig
from inference_shardformer.engine.ahead import Ahead
from inference_shardformer.engine.batch import BatchBuilder
from inference_shardformer.engine.logprobs import TokenLogprobs
from inference_shardformer.engine.model_runner import ModelRunner
from inference_shardformer.engine.request import Request
from inference_shardformer.engine.sampler import Sampler
from inference_shardformer.engine.scheduler import Scheduler, SchedulerOutput
from inference_shardformer.engine.scorer import Scorer
from inference_shardformer.engine.scoring import Scoring
from inference_shardformer.engine.staging import OnItsWay, on_device, staged


class Choice(NamedTuple):
    """A token, or the code of why there is none; with log-probabilities where they are wanted."""

    token_id: int
    logprobs: TokenLogprobs | None = None


class Sampled(NamedTuple):
    """The requests that were sampled in a step, and what was chosen for each: a token, or more behind right drafts.

    Log-probabilities of prompts are of the prompt tokens that follow the ones of the step.
    """

    requests: list[Request]
    choices: list[Sequence[Choice]]
    prompt_logprobs: dict[Request, list[TokenLogprobs]]


class StepRunner:
    """Builds, runs and samples. With `overlap` the next step is prepared while the device is at this one."""

    def __init__(
        self,
        *,
        runner: ModelRunner,
        sampler: Sampler,
        scorer: Scorer,
        scheduler: Scheduler,
        build: BatchBuilder,
        device: torch.device,
        overlap: bool,
        is_given_up: Callable[[], bool],
    ) -> None:
        """`is_given_up` says that the ranks have failed, and the device need not be waited for."""
        self._runner = runner
        self._sampler = sampler
        self._scorer = scorer
        self._build = build
        self._device = device
        self._is_given_up = is_given_up
        self.ahead = Ahead(scheduler, build) if overlap else None

    def run(self, output: SchedulerOutput, limits: SchedulerConfig, meanwhile: Callable[[], None]) -> Sampled:
        """Run one step; `meanwhile` is called once the device has been given all its work, before it is waited for."""
        with on_device(self._device):
            return self._run(output, limits, meanwhile)

    def _run(self, output: SchedulerOutput, limits: SchedulerConfig, meanwhile: Callable[[], None]) -> Sampled:
        batch = (self.ahead and self.ahead.take(output)) or self._build(output)
        logits, greatest = self._runner.run(batch)
        scoring = Scoring(self._scorer, self._is_given_up)
        if batch.prompts:
            scoring.start_prompts(batch.prompts, logits)
            places = staged(batch.rows_to_sample, torch.int64, logits.device)
            logits, greatest = logits[places], greatest and (greatest[0][places], greatest[1][places])
        token_ids = self._sampler.sample_on_device(logits, batch.rows, greatest)
        on_its_way = OnItsWay(token_ids, self._is_given_up)
        scoring.start(batch.rows, logits, token_ids)
        for request, num_new_tokens in output.scheduled:
            request.num_computed_tokens += num_new_tokens - len(request.drafts)
        if self.ahead is not None:
            self.ahead.prepare(batch, token_ids, limits)
        meanwhile()
        sampled = on_its_way.wait()
        logprobs = scoring.wait(sampled)
        choices = [Choice(token_id, logprobs.get(row)) for row, token_id in enumerate(sampled)]
        requests = batch.requests_to_sample
        return Sampled(requests, _of_each(requests, choices), scoring.wait_for_prompts())


def _of_each(requests: Sequence[Request], choices: Sequence[Choice]) -> list[Sequence[Choice]]:
    """What counts for each request, of the choices of its row and of those of its drafts, one behind the other."""
    of_each: list[Sequence[Choice]] = []
    start = 0
    for request in requests:
        own = choices[start : start + 1 + len(request.drafts)]
        of_each.append(own[: request.verify([choice.token_id for choice in own])])
        start += len(own)
    return of_each
