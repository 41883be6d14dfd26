"""InferenceEngine: what a user calls to generate with a sharded model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Literal
from weakref import WeakMethod

from inference_shardformer.attention.switch import BackendSwitch
from inference_shardformer.config.model import ModelFacts
from inference_shardformer.config.resolved import ResolvedConfig
from inference_shardformer.engine.assembly import EngineGroup, assemble
from inference_shardformer.engine.backend_switch import BackendChange
from inference_shardformer.engine.calls import Call, summary
from inference_shardformer.engine.core import EngineCore, StepGuard
from inference_shardformer.engine.desk import RequestDesk
from inference_shardformer.engine.detokenizer import Tokenizer
from inference_shardformer.engine.fair_lock import FairLock
from inference_shardformer.engine.graphs import decode_graphs
from inference_shardformer.engine.intake import Prompt, ValidPrompt, pair_prompts
from inference_shardformer.engine.live_config import LiveConfig
from inference_shardformer.engine.live_updates import ConfigUpdate
from inference_shardformer.engine.model_runner import AttentionPlanner, CausalModel, ModelRunner
from inference_shardformer.engine.outputs import RequestOutput, StepStats, StreamChunk
from inference_shardformer.engine.sampling_params import SamplingParams
from inference_shardformer.engine.weight_stream import WeightWriter
from inference_shardformer.engine.weight_updates import Weights
from inference_shardformer.errors import EnvironmentMismatchError, RankFailure, RequestError, StateError
from inference_shardformer.kv_cache.cache import PagedKVCache


class InferenceEngine:
    """Generates with a sharded model: continuous batching over a paged cache.

    Every rank makes the same calls and gets the same outputs; a rank above 0 may also just `step()` and follow rank 0.
    Calls from several threads are served in their order, one step at a time. A failure of a rank ends the engine on
    all of them. `config` is the live configuration, which lives and dies with the engine.
    """

    def __init__(
        self,
        model: CausalModel,
        *,
        facts: ModelFacts,
        config: ResolvedConfig,
        attention: AttentionPlanner,
        kv_cache: PagedKVCache,
        group: EngineGroup,
        guard: StepGuard,
        vocab_range: tuple[int, int],
        tokenizer: Tokenizer | None = None,
        switch: BackendSwitch | None = None,
        weights: WeightWriter | None = None,
    ) -> None:
        self.facts = facts
        self.tokenizer = tokenizer
        graphs = decode_graphs(config, group.device)
        self._runner: ModelRunner | None = ModelRunner(model, attention=attention, kv_cache=kv_cache, graphs=graphs)
        self._lock = FairLock()
        self._state: Literal["ready", "failed", "closed"] = "ready"
        self._is_alone = group.size == 1
        parts = assemble(
            self._runner,
            facts=facts,
            config=config,
            group=group,
            guard=guard,
            vocab_range=vocab_range,
            tokenizer=tokenizer,
            switch=switch,
            weights=weights,
        )
        self._store, self._updates = parts.store, parts.updates
        self._core: EngineCore | None = parts.core
        self._desk: RequestDesk | None = parts.desk
        self.config = LiveConfig(self._store, WeakMethod(self.update_config))

    @property
    def kv_cache(self) -> PagedKVCache:
        """The paged cache."""
        if self._runner is None:
            raise _illegal("kv_cache", self._state)
        return self._runner.kv_cache

    @property
    def num_unfinished(self) -> int:
        """Requests that wait or run."""
        with self._lock:
            return self._ready("num_unfinished").num_unfinished

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
            desk = self._ready("generate()")
            desk.submit(desk.validate(wanted, call, must_all_be_valid=on_error == "raise"), call)
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
            valid = self._ready("stream()").validate(wanted, call, must_all_be_valid=True)
        return self._stream(valid, call)

    def add_request(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, *, request_id: str | None = None
    ) -> str:
        """Queue one request and return its id; `step()` hands out its output."""
        with self._lock:
            params = SamplingParams() if sampling_params is None else sampling_params
            return self._ready("add_request()").add(prompt, params, request_id)

    def step(self) -> list[RequestOutput]:
        """Run one step; the outputs of added requests that have finished since the last call."""
        with self._lock:
            self._run_step("step()")
            return self._ready("step()").take()

    def abort(self, request_id: str) -> bool:
        """End a request early; False if it is unknown or has finished.

        Its output says "abort" and holds what was generated. With several ranks this happens in the next step.
        """
        with self._lock:
            return self._ready("abort()").abort(request_id)

    def update_config(self, changes: Mapping[str, object], *, source: str = "call") -> ConfigUpdate:
        """Change several live fields at once, between two steps: on every rank at the same one, or on none.

        What this rank refuses (a name, a value, a subscriber's veto) raises here, all of it in one ConfigError, and
        nothing has changed. With one rank the update is in effect on return; with several it waits for the next step,
        where a veto of any rank gives it up on all: the `ConfigUpdate` then tells. Requests that were queued before it
        keep their defaults, later ones get the new ones. A rank above 0 makes the same call, or none.
        """
        with self._lock:
            desk = self._ready("update_config()")
            if self._is_alone and not self._updates.is_asking:
                desk.receive()  # what was queued before is admitted before
            return self._updates.update(changes, source)

    def switch_backend(self, name: str) -> BackendChange:
        """Exchange the attention backend between two steps, with live requests: on every rank, or on none.

        What this rank can see to be impossible (an unknown or refused name) raises here. With one rank the rest raises
        too, and the backend serves on return; with several it is settled in the next step, and `BackendChange` tells.
        Requests keep their tokens, and the cache is converted if the layouts differ. Raises `BackendUnavailableError`,
        `PluginError`, `ConfigError` or `CapacityError`; the old backend then serves on. A rank above 0 makes the same
        call, or none.
        """
        with self._lock:
            self._refuse_in_callback("switch_backend()")
            return self._ready("switch_backend()").switch_backend(name)

    def update_weights(self, weights: Weights) -> int:
        """Exchange weights in place, between two steps and on every rank; returns how many tensors were stored.

        `weights` are whole tensors by the names of the unsharded Hugging Face model, all of them or some: a mapping,
        checked as a whole before anything changes, or an iterator of pairs, of which one is held at a time. Every rank
        brings the same and cuts its own part; or rank 0 alone does, the others step(), and each tensor is sent to them.
        With several ranks this runs one step. Keys and values that running requests have cached stay as they are.

        Raises `CheckpointError` where the weights are refused: nothing has changed then. What fails later ends the
        engine on all ranks with the same `RankFailure`.
        """
        with self._lock:
            self._refuse_in_callback("update_weights()")
            try:
                update = self._ready("update_weights()").update_weights(weights)
            except RankFailure:
                self._state = "failed"
                raise
            if not self._is_alone:
                self._run_step("update_weights()")
            if update.error is not None:
                raise update.error
            return update.num_tensors

    def has_unfinished(self) -> bool:
        """Whether `step()` has anything left to do or to hand out."""
        with self._lock:
            return self._ready("has_unfinished()").has_work

    def close(self) -> None:
        """Drop all requests and subscribers; let go of the model and the cache. Idempotent; other calls then raise.

        An update that waits is rolled back; raises ConfigError, once closed, if a subscriber failed in that.
        """
        with self._lock:
            self._refuse_in_callback("close()")
            if self._core is not None:
                self._core.drop(set(self._core.live))
                self._core.switches.close()
            self._state = "closed"
            self._core = self._desk = self._runner = None
            self._updates.close()
            self._store.close()

    def __enter__(self) -> InferenceEngine:
        self._ready("with")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _stream(self, valid: list[tuple[int, ValidPrompt]], call: Call) -> Iterator[StreamChunk]:
        with self._lock:
            self._ready("stream()").submit(valid, call)
        with self._dropping(call):
            while call.is_open or call.chunks:
                while call.chunks:
                    chunk = call.chunks.popleft()
                    yield chunk
                    error = call.outputs[chunk.index].error if chunk.finish_reason is not None else None
                    if error is not None:
                        raise error
                self._step_for(call, "stream()")

    def _step_for(self, call: Call, name: str) -> StepStats | None:
        """One step on behalf of a call; None if another thread has just finished the call's requests."""
        with self._lock:
            return self._run_step(name) if call.is_open else None

    def _run_step(self, name: str) -> StepStats:
        self._refuse_in_callback(name)
        try:
            return self._ready(name).step()
        except (RankFailure, EnvironmentMismatchError):
            self._state = "failed"
            raise

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
        with self._lock:
            if self._desk is not None:
                self._desk.leave(call, is_agreed=is_agreed)

    def _ready(self, name: str) -> RequestDesk:
        if self._desk is None or self._state != "ready":
            raise _illegal(name, self._state)
        return self._desk

    def _refuse_in_callback(self, name: str) -> None:
        if self._updates.is_asking:
            raise StateError(
                f"{name} by a callback of a running update",
                remedy="legal calls in a callback: reading, subscribe(), update_config() (its turn comes afterwards)",
            )


def _illegal(name: str, state: str) -> StateError:
    legal = "close()" if state == "failed" else "close(), which does nothing more"
    return StateError(f"{name} on an engine that is {state}", remedy=f"legal calls: {legal}; attach the model again")
