"""Ahead: the batch of the next step, built while the device computes the present one."""

from __future__ import annotations

import torch

from inference_shardformer.config.inference import SchedulerConfig
from inference_shardformer.engine.batch import BatchBuilder, ForwardBatch, SampledTokens
from inference_shardformer.engine.scheduler import Scheduler, SchedulerOutput


class Ahead:
    """Builds on what is certain: who runs goes on, with the token that the device is about to sample.

        device   | forward, sampling (t) ............. | ids (t) | forward (t + 1) ...
        host     | prepare (t + 1), text (t - 1) | wait for ids  | update, receive, schedule, take

    The scheduler decides nonetheless, when the ids and the events are there. If it decides otherwise, because a
    request ended, came or was preempted, what was prepared is dropped and the step is built from what is known.
    """

    def __init__(self, scheduler: Scheduler, build: BatchBuilder) -> None:
        self._scheduler = scheduler
        self._build = build
        self._prepared: tuple[SchedulerOutput, ForwardBatch] | None = None
        self.num_taken = 0

    def prepare(self, present: ForwardBatch, token_ids: torch.Tensor, limits: SchedulerConfig) -> None:
        """Build the step after `present`, which samples `token_ids` `[num_logits]`; nothing where it is not certain.

        The computed tokens of `present` are counted already.
        """
        expected = self._scheduler.expect(limits)
        if expected is None:
            return
        rows = {request: row for row, request in enumerate(present.requests_to_sample)}
        self._prepared = expected, self._build(expected, SampledTokens(token_ids, rows))

    def take(self, output: SchedulerOutput) -> ForwardBatch | None:
        """The prepared batch if it is that of `output`. In any case nothing stays prepared."""
        prepared, self._prepared = self._prepared, None
        if prepared is None:
            return None
        expected, batch = prepared
        seq_lens = [request.num_computed_tokens + num_new_tokens for request, num_new_tokens in output.scheduled]
        seq_lens += seq_lens[-1:] * self._build.num_padding(output)
        if expected.scheduled != output.scheduled or batch.ragged.host_seq_lens != seq_lens:
            return None
        self.num_taken += 1
        return batch
