"""InferenceEngine: what a user calls to generate with a sharded model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from threading import RLock
from types import TracebackType
from typing import Literal, Protocol

from inference_shardformer.attention.base import AttentionBackend
from inference_shardformer.config.model import ModelFacts
from inference_shardformer.config.resolved import ResolvedConfig
from inference_shardformer.engine.calls import Call, Outbox, rejected, summary
from inference_shardformer.engine.core import EngineCore, StepGuard
from inference_shardformer.engine.detokenizer import Tokenizer
from inference_shardformer.engine.distribution import derived_seed
from inference_shardformer.engine.events import AbortRequest, AddRequest, ByteGroup, EventExchange
from inference_shardformer.engine.intake import Intake, Prompt, ValidPrompt, pair_prompts
from inference_shardformer.engine.model_runner import CausalModel, ModelRunner
from inference_shardformer.engine.outputs import RequestOutput, StepStats, StreamChunk
from inference_shardformer.engine.sampler import Sampler, TensorGroup
from inference_shardformer.engine.sampling_params import SamplingParams
from inference_shardformer.engine.scheduler import Scheduler
from inference_shardformer.errors import EnvironmentMismatchError, RankFailure, RequestError, StateError
from inference_shardformer.kv_cache.block_allocator import BlockAllocator
from inference_shardformer.kv_cache.cache import PagedKVCache


class EngineGroup(ByteGroup, TensorGroup, Protocol):
    """The collectives the engine uses."""


class InferenceEngine:
    """Generates with a sharded model: continuous batching over a paged cache.

    Every rank makes the same calls and gets the same outputs; a rank above 0 may also just `step()` and follow rank 0.
    Calls from several threads are served one step at a time. A failure of a rank ends the engine on all of them.
    """

    def __init__(
        self,
        model: CausalModel,
        *,
        facts: ModelFacts,
        config: ResolvedConfig,
        backend: AttentionBackend,
        kv_cache: PagedKVCache,
        group: EngineGroup,
        guard: StepGuard,
        vocab_range: tuple[int, int],
        tokenizer: Tokenizer | None = None,
    ) -> None:
        block_size = kv_cache.spec.block_size
        self.config = config
        self.facts = facts
        self.tokenizer = tokenizer
        self._kv_cache: PagedKVCache | None = kv_cache
        self._lock = RLock()
        self._state: Literal["ready", "failed", "closed"] = "ready"
        self._is_alone = group.size == 1
        self._outbox = Outbox()
        self._intake = Intake(
            facts=facts, config=config, num_blocks=kv_cache.num_blocks, block_size=block_size, tokenizer=tokenizer
        )
        guard.agree("create the engine", self._intake.limits())
        self._exchange = EventExchange(group)
        self._core: EngineCore | None = EngineCore(
            runner=ModelRunner(model, backend=backend, kv_cache=kv_cache),
            sampler=Sampler(group, vocab_range),
            scheduler=Scheduler(config.inference.scheduler, BlockAllocator(kv_cache.num_blocks), block_size=block_size),
            exchange=self._exchange,
            guard=guard,
            device=group.device,
            eos_token_ids=facts.eos_token_ids,
            tokenizer=tokenizer,
            with_rope_lengths=facts.length_dependent_rope,
        )

    @property
    def kv_cache(self) -> PagedKVCache:
        """The paged cache."""
        if self._kv_cache is None:
            raise _illegal("kv_cache", self._state)
        return self._kv_cache

    @property
    def num_unfinished(self) -> int:
        """Requests that wait or run."""
        with self._lock:
            return self._ready("num_unfinished").scheduler.num_unfinished + self._exchange.num_pending_adds

    def generate(
        self,
        prompts: str | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        on_error: Literal["raise", "return"] = "raise",
        on_step: Callable[[StepStats], None] | None = None,
    ) -> list[RequestOutput]:
        """Generate for all prompts; outputs come in the order of the prompts.

        Every request is checked before one is queued. With `on_error="raise"` one `RequestError` names all that cannot
        be served; with "return" these come back with their `error`, and the others run. `on_step` is called after each
        step. If anything raises, this call's requests are dropped and their blocks freed.
        """
        if on_error not in ("raise", "return"):
            raise RequestError(f"on_error={on_error!r} is not known", remedy="choose 'raise' or 'return'")
        wanted = pair_prompts(prompts, sampling_params)
        call = Call(is_streaming=False)
        with self._lock:
            self._ready("generate()")
            valid = self._validate(wanted, call, must_all_be_valid=on_error == "raise")
            self._submit_all(valid, call)
        with self._dropping(call):
            while call.is_open:
                stats = self._step_for(call, "generate()")
                if on_step is not None and stats is not None:
                    on_step(stats)
        errors = {output.index: output.error for output in call.in_order() if output.error is not None}
        if errors and on_error == "raise":
            raise summary(errors, len(wanted))
        return call.in_order()

    def stream(
        self,
        prompts: str | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> Iterator[StreamChunk]:
        """Generate for all prompts and yield what each step adds, as it comes.

        Invalid requests raise here, before the first chunk. Closing the iterator aborts what is left.
        """
        wanted = pair_prompts(prompts, sampling_params)
        call = Call(is_streaming=True)
        with self._lock:
            self._ready("stream()")
            valid = self._validate(wanted, call, must_all_be_valid=True)
        return self._stream(valid, call)

    def add_request(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, *, request_id: str | None = None
    ) -> str:
        """Queue one request and return its id; `step()` hands out its output."""
        with self._lock:
            self._ready("add_request()")
            if request_id is not None and (not isinstance(request_id, str) or self._is_known(request_id)):
                raise RequestError(
                    f"request_id={request_id!r} is not text, or is in use",
                    remedy="choose another, reuse it once the request has finished, or leave it out",
                )
            valid = self._intake.validate(prompt, SamplingParams() if sampling_params is None else sampling_params)
            return self._submit(valid, index=0, request_id=request_id)

    def step(self) -> list[RequestOutput]:
        """Run one step; the outputs of added requests that have finished since the last call."""
        with self._lock:
            self._run_step("step()")
            return self._outbox.take()

    def abort(self, request_id: str) -> bool:
        """End a request early; False if it is unknown or has finished.

        Its output says "abort" and holds what was generated. With several ranks this happens in the next step.
        """
        with self._lock:
            core = self._ready("abort()")
            if not self._is_known(request_id):
                return False
            self._exchange.post(AbortRequest(request_id))
            if self._is_alone:
                core.receive()
                self._outbox.deliver(core.take_finished())
            return True

    def has_unfinished(self) -> bool:
        """Whether `step()` has anything left to do or to hand out."""
        with self._lock:
            return bool(self.num_unfinished or self._exchange.has_pending or self._outbox.has_outputs)

    def close(self) -> None:
        """Drop all requests and let go of the model and the cache. Idempotent; every other call then raises."""
        with self._lock:
            if self._core is not None:
                self._core.drop(set(self._core.live))
            self._state = "closed"
            self._core = self._kv_cache = None
            self._outbox = Outbox()

    def __enter__(self) -> InferenceEngine:
        self._ready("with")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _stream(self, valid: list[tuple[int, ValidPrompt]], call: Call) -> Iterator[StreamChunk]:
        with self._lock:
            self._ready("stream()")
            self._submit_all(valid, call)
        with self._dropping(call):
            while call.is_open or call.chunks:
                while call.chunks:
                    chunk = call.chunks.popleft()
                    yield chunk
                    error = call.outputs[chunk.index].error if chunk.finish_reason is not None else None
                    if error is not None:
                        raise error
                self._step_for(call, "stream()")

    def _validate(
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
                call.close(rejected(index, prompt, error))
        if errors and must_all_be_valid:
            raise summary(errors, len(wanted))
        return valid

    def _submit_all(self, valid: list[tuple[int, ValidPrompt]], call: Call) -> None:
        for index, prompt in valid:
            request_id = self._submit(prompt, index=index)
            self._outbox.expect(request_id, call)

    def _submit(self, valid: ValidPrompt, *, index: int, request_id: str | None = None) -> str:
        number = self._ready("add_request()").num_added + self._exchange.num_pending_adds
        request_id = self._new_id(number) if request_id is None else request_id
        sampling = valid.sampling
        if not valid.has_own_seed:
            sampling = replace(sampling, seed=derived_seed(sampling.seed, number))
        self._exchange.post(AddRequest(request_id, index, valid.prompt, valid.token_ids, sampling))
        return request_id

    def _new_id(self, number: int) -> str:
        """A free id that depends only on what was submitted before, so that it is the same on every rank."""
        while self._is_known(f"request-{number}"):
            number += 1
        return f"request-{number}"

    def _is_known(self, request_id: str) -> bool:
        return request_id in self._ready("abort()").live or self._exchange.adds(request_id)

    def _step_for(self, call: Call, name: str) -> StepStats | None:
        """One step on behalf of a call; None if another thread has just finished the call's requests."""
        with self._lock:
            return self._run_step(name) if call.is_open else None

    def _run_step(self, name: str) -> StepStats:
        core = self._ready(name)
        try:
            result = core.step()
        except (RankFailure, EnvironmentMismatchError):
            self._state = "failed"
            raise
        self._outbox.note(result.advanced)
        self._outbox.deliver(core.take_finished())
        return result.stats

    @contextmanager
    def _dropping(self, call: Call) -> Iterator[None]:
        """Drop the call's requests if it does not come to its end."""
        try:
            yield
        except GeneratorExit:
            self._leave(call, is_agreed=False)
            raise
        except BaseException:
            self._leave(call, is_agreed=True)
            raise

    def _leave(self, call: Call, *, is_agreed: bool) -> None:
        """Give up what a call left; `is_agreed` if every rank is doing the same right now."""
        with self._lock:
            left = set(call.request_ids)
            if self._core is None:
                return
            if self._is_alone or is_agreed:
                self._core.drop(left)
                self._outbox.forget(left)
                return
            for request_id in sorted(left):
                self._exchange.post(AbortRequest(request_id))

    def _ready(self, name: str) -> EngineCore:
        if self._core is None or self._state != "ready":
            raise _illegal(name, self._state)
        return self._core


def _illegal(name: str, state: str) -> StateError:
    legal = "close()" if state == "failed" else "close(), which does nothing more"
    return StateError(f"{name} on an engine that is {state}", remedy=f"legal calls: {legal}; attach the model again")
