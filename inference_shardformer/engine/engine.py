"""InferenceEngine: what a user calls to generate with a sharded model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Literal
from weakref import WeakMethod

from inference_shardformer.attention.switch import BackendSwitch
from inference_shardformer.compute.sampling import Draw, Greatest
from inference_shardformer.config.model import ModelFacts
from inference_shardformer.config.resolved import ResolvedConfig
from inference_shardformer.engine.access import EngineAccess
from inference_shardformer.engine.assembly import EngineGroup, assemble
from inference_shardformer.engine.backend_switch import BackendChange
from inference_shardformer.engine.calls import Call, summary
from inference_shardformer.engine.core import EngineCore, StepGuard
from inference_shardformer.engine.detokenizer import Tokenizer
from inference_shardformer.engine.graphs import decode_graphs
from inference_shardformer.engine.intake import Prompt, ValidPrompt, pair_prompts
from inference_shardformer.engine.live_config import LiveConfig
from inference_shardformer.engine.live_updates import ConfigUpdate
from inference_shardformer.engine.model_runner import AttentionPlanner, CausalModel, ModelRunner
from inference_shardformer.engine.outputs import PrefixCacheStats, RequestOutput, StepStats, StreamChunk
from inference_shardformer.engine.sampling_params import SamplingParams
from inference_shardformer.engine.weight_stream import WeightWriter
from inference_shardformer.engine.weight_updates import Weights
from inference_shardformer.errors import RequestError, StateError
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
        draw: Draw | None = None,
        greatest: Greatest | None = None,
    ) -> None:
        """`draw` and `greatest` choose tokens, of requests that draw and of greedy ones; without them torch does."""
        self.facts = facts
        self.tokenizer = tokenizer
        graphs = decode_graphs(config, group.device)
        self._runner: ModelRunner | None = ModelRunner(model, attention=attention, kv_cache=kv_cache, graphs=graphs)
        self.rank = group.rank
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
            draw=draw,
            greatest=greatest,
        )
        self._store, self._updates = parts.store, parts.updates
        self._core: EngineCore | None = parts.core
        self._access = EngineAccess(parts.desk, parts.updates)
        self.config = LiveConfig(self._store, WeakMethod(self.update_config))

    @property
    def kv_cache(self) -> PagedKVCache:
        """The paged cache."""
        if self._runner is None:
            raise self._access.illegal("kv_cache")
        return self._runner.kv_cache

    @property
    def num_unfinished(self) -> int:
        """Requests that wait or run."""
        with self._access.lock:
            return self._access.desk("num_unfinished").num_unfinished

    @property
    def prefix_cache_stats(self) -> PrefixCacheStats | None:
        """What came of the prefix cache since the engine was attached; `None` where there is none."""
        with self._access.lock:
            return self._access.desk("prefix_cache_stats").prefix_cache_stats

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
        step. If anything raises, this call's requests are dropped and their blocks freed; with several ranks in the
        next step, and where rank 0 raised: the call of another rank then ends with outputs that say "abort".
        """
        if on_error not in ("raise", "return"):
            raise RequestError(f"on_error={on_error!r} is not known", remedy="choose 'raise' or 'return'")
        wanted = pair_prompts(prompts, sampling_params)
        call = Call(is_streaming=False)
        with self._access.lock:
            desk = self._access.desk("generate()")
            desk.submit(desk.validate(wanted, call, must_all_be_valid=on_error == "raise"), call)
        with self._access.dropping(call):
            while call.is_open:
                stats = self._access.step_for(call, "generate()")
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

        Invalid requests raise here, before the first chunk. Closing the iterator aborts what is left;
        with several ranks that of rank 0 counts.
        """
        wanted = pair_prompts(prompts, sampling_params)
        call = Call(is_streaming=True)
        with self._access.lock:
            valid = self._access.desk("stream()").validate(wanted, call, must_all_be_valid=True)
        return self._stream(valid, call)

    def add_request(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, *, request_id: str | None = None
    ) -> str:
        """Queue one request and return its id; `step()` hands out its output."""
        with self._access.lock:
            params = SamplingParams() if sampling_params is None else sampling_params
            return self._access.desk("add_request()").add(prompt, params, request_id)

    def add_stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, *, request_id: str | None = None
    ) -> Call:
        """Queue one request whose chunks and output gather in the `Call` that is returned, while others `step()`."""
        with self._access.lock:
            params = SamplingParams() if sampling_params is None else sampling_params
            return self._access.desk("add_stream()").add_stream(prompt, params, request_id)

    def validate(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> tuple[int, ...]:
        """The token ids with which `add_request` would queue a prompt; raises `RequestError` as that would.

        Nothing is queued, and no step is waited for.
        """
        params = SamplingParams() if sampling_params is None else sampling_params
        return self._access.desk("validate()").validate_one(prompt, params).token_ids

    def step(self, *, on_step: Callable[[StepStats], None] | None = None) -> list[RequestOutput]:
        """Run one step; the outputs of added requests that have finished since the last call."""
        with self._access.lock:
            stats = self._access.step("step()")
            outputs = self._access.desk("step()").take()
        if on_step is not None:
            on_step(stats)
        return outputs

    def follow(self) -> None:
        """Step with rank 0 until that calls `dismiss()`; for a rank above 0 that makes no other calls."""
        if self.rank == 0:
            raise StateError("follow() on rank 0", remedy="rank 0 makes the calls that the other ranks follow")
        while not self._access.desk("follow()").take_dismissal():
            self.step()

    def dismiss(self) -> None:
        """Let the other ranks return from `follow()`. Runs one step if there are any."""
        if self._is_alone:
            return
        with self._access.lock:
            self._access.desk("dismiss()").dismiss()
            self._access.step("dismiss()")

    def abort(self, request_id: str) -> bool:
        """End a request early; False if it is unknown or has finished.

        Its output says "abort" and holds what was generated. With several ranks this happens in the next step.
        """
        with self._access.lock:
            return self._access.desk("abort()").abort(request_id)

    def reset_prefix_cache(self) -> None:
        """Let no later request find what was computed so far; running ones keep their blocks.

        With one rank this is done on return, with several in the next step, on all ranks at the same one. A rank above
        0 makes the same call, or none. Nothing happens where there is no prefix cache.
        """
        with self._access.lock:
            self._access.refuse_in_callback("reset_prefix_cache()")
            self._access.desk("reset_prefix_cache()").reset_prefix_cache()

    def update_config(self, changes: Mapping[str, object], *, source: str = "call") -> ConfigUpdate:
        """Change several live fields at once, between two steps: on every rank at the same one, or on none.

        What this rank refuses (a name, a value, a subscriber's veto) raises here, all of it in one ConfigError, and
        nothing has changed. With one rank the update is in effect on return; with several it waits for the next step,
        where a veto of any rank gives it up on all: the `ConfigUpdate` then tells. Requests that were queued before it
        keep their defaults, later ones get the new ones. A rank above 0 makes the same call, or none.
        """
        with self._access.lock:
            desk = self._access.desk("update_config()")
            if self._is_alone and not self._updates.is_asking:
                desk.receive()  # what was queued before is admitted before
            return self._updates.update(changes, source)

    def switch_backend(self, name: str) -> BackendChange:
        """Exchange the attention backend between two steps, with live requests: on every rank, or on none.

        What this rank can see to be impossible (an unknown or refused name) raises here. With one rank the rest raises
        too, and the backend serves on return; with several it is settled in the next step, and `BackendChange` tells.
        Requests keep their tokens, and the cache is converted if the layouts differ; later requests find nothing that
        the old backend computed. Raises `BackendUnavailableError`, `PluginError`, `ConfigError` or `CapacityError`; the
        old backend then serves on. A rank above 0 makes the same call, or none.
        """
        with self._access.lock:
            self._access.refuse_in_callback("switch_backend()")
            return self._access.desk("switch_backend()").switch_backend(name)

    def update_weights(self, weights: Weights) -> int:
        """Exchange weights in place, between two steps and on every rank; returns how many tensors were stored.

        `weights` are whole tensors by the names of the unsharded Hugging Face model, all of them or some: a mapping,
        checked as a whole before anything changes, or an iterator of pairs, of which one is held at a time. Every rank
        brings the same and cuts its own part; or rank 0 alone does, the others step(), and each tensor is sent to them.
        With several ranks this runs one step. Keys and values that running requests have cached stay as they are; later
        requests find nothing that was computed before.

        Raises `CheckpointError` where the weights are refused: nothing has changed then. What fails later ends the
        engine on all ranks with the same `RankFailure`.
        """
        with self._access.lock:
            self._access.refuse_in_callback("update_weights()")
            with self._access.ending():
                update = self._access.desk("update_weights()").update_weights(weights)
            if not self._is_alone:
                self._access.step("update_weights()")
            if update.error is not None:
                raise update.error
            return update.num_tensors

    def has_unfinished(self) -> bool:
        """Whether `step()` has anything left to do or to hand out."""
        with self._access.lock:
            return self._access.desk("has_unfinished()").has_work

    def close(self) -> None:
        """Drop all requests and subscribers; let go of the model and the cache. Idempotent; other calls then raise.

        An update that waits is rolled back; raises ConfigError, once closed, if a subscriber failed in that.
        """
        with self._access.lock:
            self._access.refuse_in_callback("close()")
            if self._core is not None:
                self._core.drop(set(self._core.live))
                self._core.switches.close()
            self._access.close()
            self._core = self._runner = None
            self._updates.close()
            self._store.close()

    def __enter__(self) -> InferenceEngine:
        self._access.desk("with")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _stream(self, valid: list[tuple[int, ValidPrompt]], call: Call) -> Iterator[StreamChunk]:
        with self._access.lock:
            self._access.desk("stream()").submit(valid, call)
        with self._access.dropping(call):
            while call.is_open or call.chunks:
                while call.chunks:
                    chunk = call.chunks.popleft()
                    yield chunk
                    error = call.outputs[chunk.index].error if chunk.finish_reason is not None else None
                    if error is not None:
                        raise error
                self._access.step_for(call, "stream()")
