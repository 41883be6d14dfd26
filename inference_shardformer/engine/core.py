"""EngineCore: the state machine that every rank replays; one step is receive, schedule, build, run, sample, update."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from time import perf_counter
from typing import NamedTuple, Protocol

from inference_shardformer.config.inference import SchedulerConfig
from inference_shardformer.config.store import ConfigStore
from inference_shardformer.engine.backend_switch import BackendSwitches
from inference_shardformer.engine.detokenizer import RequestText, Tokenizer
from inference_shardformer.engine.events import (
    AddRequest,
    Dismiss,
    Event,
    EventExchange,
    ResetPrefixCache,
    SwitchBackend,
    UpdateConfig,
    UpdateWeights,
)
from inference_shardformer.engine.intake import Intake
from inference_shardformer.engine.live_updates import LiveUpdates
from inference_shardformer.engine.logprobs import TokenLogprobs
from inference_shardformer.engine.outputs import StepStats
from inference_shardformer.engine.request import FinishReason, Request
from inference_shardformer.engine.sampler import NOT_FINITE, NOTHING_LEFT
from inference_shardformer.engine.scheduler import Scheduler, SchedulerOutput
from inference_shardformer.engine.step_runner import Choice, Sampled, StepRunner
from inference_shardformer.engine.weight_updates import WeightUpdates
from inference_shardformer.engine.wishes import may_not_end
from inference_shardformer.errors import RequestError


class StepGuard(Protocol):
    """Tells all ranks if one of them fails inside a step, or differs from the others."""

    def agree(self, phase: str, facts: Mapping[str, str]) -> None:
        """Raise the same error on every rank unless all bring the same facts."""

    def step(self, phase: str) -> AbstractContextManager[object]:
        """Guard the code of one phase of a step."""


class LiveRequest(NamedTuple):
    """A request the engine works on, with its text."""

    request: Request
    text: RequestText


class Advance(NamedTuple):
    """What a step gave to a request: tokens, with log-probabilities where they were asked for."""

    live: LiveRequest
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()


class StepResult(NamedTuple):
    """The requests that got tokens, with them; the facts of the step."""

    advanced: list[Advance]
    stats: StepStats


class EngineCore:
    """Requests, queues and cache blocks of one engine. Deterministic: the same events give the same steps.

    Events take effect in their order at the start of a step: a request takes the sampling defaults of the configuration
    as the events before it left it, and keeps them; the limits of the step are those after the last event.
    `meanwhile` does what the last step left to do, such as its text: while the device is at the next one, or before
    events change what it needs.
    """

    def __init__(
        self,
        *,
        steps: StepRunner,
        scheduler: Scheduler,
        exchange: EventExchange,
        intake: Intake,
        config: ConfigStore,
        updates: LiveUpdates,
        switches: BackendSwitches,
        weights: WeightUpdates,
        guard: StepGuard,
        eos_token_ids: tuple[int, ...],
        tokenizer: Tokenizer | None,
        rope_switch_length: int | None = None,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> None:
        self.scheduler = scheduler
        self.exchange = exchange
        self.live: dict[str, LiveRequest] = {}
        self.num_added = 0
        self.is_dismissed = False
        self._intake = intake
        self._config = config
        self._updates = updates
        self.switches = switches
        self.weights = weights
        self.steps = steps
        self._guard = guard
        self._eos_token_ids = frozenset(eos_token_ids)
        self._tokenizer = tokenizer
        self._rope_switch_length = rope_switch_length
        self._meanwhile = meanwhile
        self._finished: list[LiveRequest] = []

    @property
    def config_epoch(self) -> int:
        """The epoch of the configuration as of now."""
        return self._config.current.epoch

    def step(self) -> StepResult:
        """Run one step; without requests it only receives events."""
        started = perf_counter()
        self.receive()
        snapshot = self._config.current  # read once: one step, one epoch
        limits = snapshot.inference.scheduler
        output = self.scheduler.schedule(limits)
        advanced = self._run(output, limits) if output.scheduled else []
        return StepResult(advanced, self._stats(output, perf_counter() - started, snapshot.epoch))

    def receive(self) -> None:
        """Apply what came from outside; every rank must be here at the same time."""
        with self._guard.step("receive"):
            delivery = self.exchange.receive()
        events = delivery.agreed()
        if events:
            self._meanwhile()
        for event in events:
            self._apply(event)
        self._updates.drop_unshared()
        self.switches.drop_unshared()
        self.weights.drop_unshared()

    def take_finished(self) -> list[LiveRequest]:
        """The requests that ended since the last call."""
        finished, self._finished = self._finished, []
        return finished

    def drop(self, request_ids: set[str]) -> None:
        """Forget requests at once, on this rank alone: for failures that reach every rank, and for closing."""
        self.exchange.forget(request_ids)
        for request_id in request_ids & self.live.keys():
            self._end(self.live[request_id], "abort")
        self._finished = [live for live in self._finished if live.request.request_id not in request_ids]

    def _apply(self, event: Event) -> None:
        if isinstance(event, AddRequest):
            self._add(event)
        elif isinstance(event, UpdateConfig):
            with self._guard.step("configuration update"):
                self._updates.settle(event)
        elif isinstance(event, SwitchBackend):
            with self._guard.step("backend switch"):
                self.switches.settle(event)
        elif isinstance(event, UpdateWeights):
            with self._guard.step("weight update"):
                self.weights.settle()
        elif isinstance(event, ResetPrefixCache):
            self.scheduler.forget_prefixes()
        elif isinstance(event, Dismiss):
            self.is_dismissed = True
        elif event.request_id in self.live:
            self._end(self.live[event.request_id], "abort")

    def _add(self, event: AddRequest) -> None:
        snapshot = self._config.current
        refusal: RequestError | None = None
        try:
            sampling = self._intake.admit(len(event.prompt_token_ids), event.params, snapshot)
        except RequestError as error:
            refusal, sampling = error, event.params.resolve(snapshot.inference.sampling)
        request = Request(
            event.request_id,
            event.prompt_token_ids,
            sampling,
            prompt=event.prompt,
            index=event.index,
            config_epoch=snapshot.epoch,
            rope_switch_length=self._rope_switch_length,
        )
        text = RequestText(self._tokenizer, request.token_ids, start=request.num_prompt_tokens, sampling=sampling)
        live = self.live[event.request_id] = LiveRequest(request, text)
        self.scheduler.add(request)
        self.num_added += 1
        if refusal is not None:
            request.error = refusal
            self._end(live, "rejected")

    def _run(self, output: SchedulerOutput, limits: SchedulerConfig) -> list[Advance]:
        with self._guard.step("decode" if output.is_decode else "prefill"):
            return self._update(self.steps.run(output, limits, self._meanwhile))

    def _update(self, sampled: Sampled) -> list[Advance]:
        for request, prompt_logprobs in sampled.prompt_logprobs.items():
            request.prompt_logprobs += prompt_logprobs
        advanced = []
        for request, choices in zip(sampled.requests, sampled.choices, strict=True):
            live = self.live[request.request_id]
            num_known, num_scored = request.num_tokens, len(request.logprobs)
            for place, choice in enumerate(choices):
                self._append(live, choice, is_behind_draft=place > 0)
                if request.is_finished:
                    break
            if request.num_tokens > num_known:
                token_ids, logprobs = request.token_ids[num_known:], request.logprobs[num_scored:]
                advanced.append(Advance(live, tuple(token_ids), tuple(logprobs)))
        return advanced

    def _append(self, live: LiveRequest, choice: Choice, *, is_behind_draft: bool) -> None:
        request, token_id = live.request, choice.token_id
        if token_id in (NOT_FINITE, NOTHING_LEFT):
            request.error = _no_token(request, token_id)
            self._end(live, "abort")
            return
        if is_behind_draft:  # the token before this one was drafted, and its keys and values are in the cache
            request.num_computed_tokens += 1
        request.append(token_id, choice.logprobs)
        self._end_if_complete(live, token_id)

    def _end_if_complete(self, live: LiveRequest, token_id: int) -> None:
        request, text = live
        sampling = request.sampling
        if token_id in self._eos_token_ids and not sampling.ignore_eos:
            self._end(live, "stop")
        elif token_id in sampling.stop_token_ids:
            self._end(live, "stop", token_id)
        elif sampling.stop and (matched := text.advance()) is not None:
            self._end(live, "stop", matched)
        elif request.num_output_tokens >= sampling.max_new_tokens:
            self._end(live, "length")

    def _end(self, live: LiveRequest, reason: FinishReason, stop_reason: str | int | None = None) -> None:
        request, text = live
        request.finish(reason, stop_reason)
        text.finish()
        self.scheduler.finish(request)
        del self.live[request.request_id]
        self._finished.append(live)

    def _stats(self, output: SchedulerOutput, seconds: float, config_epoch: int) -> StepStats:
        return StepStats(
            num_prefill_tokens=output.num_tokens - output.num_decode_tokens - output.num_draft_tokens,
            num_decode_tokens=output.num_decode_tokens,
            num_draft_tokens=output.num_draft_tokens,
            num_running=len(self.scheduler.running),
            num_waiting=len(self.scheduler.waiting),
            num_free_blocks=self.scheduler.allocator.num_free,
            seconds=seconds,
            config_epoch=config_epoch,
            num_queried_tokens=output.looked.num_queried_tokens,
            num_cached_tokens=output.looked.num_cached_tokens,
        )


def _no_token(request: Request, code: int) -> RequestError:
    """Why a request got no token."""
    if code == NOT_FINITE:
        return RequestError(
            f"request {request.request_id!r}: the model's logits after {request.num_tokens} tokens are not finite",
            remedy="use dtype bf16 or fp32, and check that the checkpoint holds no NaN",
        )
    size, least = request.sampling.no_repeat_ngram_size, request.sampling.min_new_tokens
    rule = f"no_repeat_ngram_size={size} forbids" if size else f"min_new_tokens={least} forbids"
    if size and may_not_end(request):
        rule = f"no_repeat_ngram_size={size} and min_new_tokens={least} forbid"
    return RequestError(
        f"request {request.request_id!r}: {rule} every token after {request.num_tokens}",
        remedy="raise no_repeat_ngram_size, or lower max_new_tokens" if size else "lower min_new_tokens",
    )
