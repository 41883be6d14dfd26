"""RequestDesk: takes requests in under free ids, runs steps, and hands outputs to whoever asked for them."""

from __future__ import annotations

from dataclasses import replace

from inference_shardformer.engine.backend_switch import BackendChange
from inference_shardformer.engine.calls import Call, Outbox, rejected, summary
from inference_shardformer.engine.core import EngineCore
from inference_shardformer.engine.distribution import derived_seed
from inference_shardformer.engine.events import AbandonRequest, AbortRequest, AddRequest, Dismiss, ResetPrefixCache
from inference_shardformer.engine.intake import Intake, Prompt, ValidPrompt
from inference_shardformer.engine.outputs import PrefixCacheStats, RequestOutput, StepStats
from inference_shardformer.engine.sampling_params import SamplingParams
from inference_shardformer.engine.weight_updates import Weights, WeightUpdate
from inference_shardformer.errors import RequestError


class RequestDesk:
    """Stands between the calls of the users and the core. Its owner holds the engine's lock during every call."""

    def __init__(self, core: EngineCore, intake: Intake, outbox: Outbox, *, is_alone: bool) -> None:
        self._core = core
        self._intake = intake
        self._exchange = core.exchange
        self._outbox = outbox
        self._is_alone = is_alone

    @property
    def num_unfinished(self) -> int:
        """Requests that wait or run."""
        return self._core.scheduler.num_unfinished + self._exchange.num_pending_adds

    @property
    def has_work(self) -> bool:
        """Whether a step has anything to do or to hand out."""
        return bool(self.num_unfinished or self._exchange.has_pending or self._outbox.has_outputs)

    def validate(
        self, wanted: list[tuple[Prompt, SamplingParams]], call: Call, *, must_all_be_valid: bool
    ) -> list[tuple[int, ValidPrompt]]:
        """The valid requests with their index; the others become outputs of the call, or one error."""
        valid: list[tuple[int, ValidPrompt]] = []
        errors: dict[int, RequestError] = {}
        for index, (prompt, params) in enumerate(wanted):
            try:
                valid.append((index, self._intake.validate(prompt, params)))
            except RequestError as error:
                errors[index] = error
                call.close(rejected(index, prompt, error, config_epoch=self._core.config_epoch))
        if errors and must_all_be_valid:
            raise summary(errors, len(wanted))
        return valid

    def submit(self, valid: list[tuple[int, ValidPrompt]], call: Call) -> None:
        """Queue the requests of a call, which gets their outputs."""
        for index, prompt in valid:
            self._outbox.expect(self._post(prompt, index=index), call)

    def add(self, prompt: Prompt, params: SamplingParams, request_id: str | None) -> str:
        """Validate and queue one request; `take()` hands out its output. Returns its id."""
        self._refuse_used(request_id)
        return self._post(self._intake.validate(prompt, params), index=0, request_id=request_id)

    def add_stream(self, prompt: Prompt, params: SamplingParams, request_id: str | None) -> Call:
        """Validate and queue one request, whose chunks and output the call gets that is returned."""
        self._refuse_used(request_id)
        call = Call(is_streaming=True)
        valid = self._intake.validate(prompt, params)
        self._outbox.expect(self._post(valid, index=0, request_id=request_id), call)
        return call

    def dismiss(self) -> None:
        """Let the ranks go that follow; takes effect in the next step."""
        self._exchange.post(Dismiss())

    def take_dismissal(self) -> bool:
        """Whether rank 0 let this rank go since the last call."""
        is_dismissed, self._core.is_dismissed = self._core.is_dismissed, False
        return is_dismissed

    def switch_backend(self, name: str) -> BackendChange:
        """Ask for another attention backend."""
        return self._core.switches.request(name)

    def update_weights(self, weights: Weights) -> WeightUpdate:
        """Ask for new weights."""
        return self._core.weights.request(weights)

    @property
    def prefix_cache_stats(self) -> PrefixCacheStats | None:
        """What came of the prefix cache; `None` where there is none."""
        blocks = self._core.scheduler.blocks
        cache = blocks.prefix_cache
        return None if cache is None else PrefixCacheStats(*blocks.looked, cache.num_blocks, cache.num_reclaimed)

    def reset_prefix_cache(self) -> None:
        """Let nothing be found that was computed before. With one rank at once, else in the next step."""
        self._exchange.post(ResetPrefixCache())
        if self._is_alone:
            self.receive()

    def abort(self, request_id: str) -> bool:
        """End a request early; False if it is unknown or has finished."""
        if not self._is_known(request_id):
            return False
        self._exchange.post(AbortRequest(request_id))
        if self._is_alone:
            self.receive()
        return True

    def receive(self) -> None:
        """Apply what was posted, without a step. With one rank only: with several, all must do so at once."""
        self._core.receive()
        self._outbox.deliver(self._core.take_finished())

    def step(self) -> StepStats:
        """Run one step and hand on what it brought."""
        result = self._core.step()
        self._outbox.note(result.advanced)
        self._outbox.deliver(self._core.take_finished())
        return result.stats

    def take(self) -> list[RequestOutput]:
        """The outputs that no call asked for, once."""
        return self._outbox.take()

    def validate_one(self, prompt: Prompt, params: SamplingParams) -> ValidPrompt:
        """What `add` would queue. Reads the configuration alone, so nobody needs the engine's lock for it."""
        return self._intake.validate(prompt, params)

    def abandon(self, call: Call) -> None:
        """Give up what a call left that did not come to its end: at once, or in the next step of several ranks.

        Nobody knows whether the other ranks give it up too. Where rank 0 does, they all do.
        """
        if not self._is_alone:
            call.is_streaming = False
            for request_id in sorted(call.request_ids):
                self._exchange.post(AbandonRequest(request_id))
            return
        left = set(call.request_ids)
        self._core.drop(left)
        self._outbox.forget(left)

    def _post(self, valid: ValidPrompt, *, index: int, request_id: str | None = None) -> str:
        number = self._core.num_added + self._exchange.num_pending_adds
        request_id = self._new_id(number) if request_id is None else request_id
        params = valid.params
        if params.seed is None:
            params = replace(params, seed=derived_seed(self._intake.seed, number))
        self._exchange.post(AddRequest(request_id, index, valid.prompt, valid.token_ids, params))
        return request_id

    def _new_id(self, number: int) -> str:
        """A free id that depends only on what was submitted before, so that it is the same on every rank."""
        while self._is_known(f"request-{number}"):
            number += 1
        return f"request-{number}"

    def _refuse_used(self, request_id: str | None) -> None:
        if request_id is not None and (not isinstance(request_id, str) or self._is_known(request_id)):
            raise RequestError(
                f"request_id={request_id!r} is not text, or is in use",
                remedy="choose another, reuse it once the request has finished, or leave it out",
            )

    def _is_known(self, request_id: str) -> bool:
        return request_id in self._core.live or self._exchange.adds(request_id)
