"""Call: what one generate or stream call asked for, and what came of it; Outbox: who gets which output."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from inference_shardformer.engine.core import Advance, LiveRequest
from inference_shardformer.engine.intake import Prompt
from inference_shardformer.engine.logprobs import TokenLogprobs
from inference_shardformer.engine.outputs import RequestOutput, StreamChunk, Usage
from inference_shardformer.errors import RequestError, StateError


class Call:
    """The requests of one call by id, their outputs by index, and the chunks nobody took yet."""

    def __init__(self, *, is_streaming: bool) -> None:
        self.request_ids: set[str] = set()
        self.outputs: dict[int, RequestOutput] = {}
        self.chunks: deque[StreamChunk] = deque()
        self.is_streaming = is_streaming

    @property
    def is_open(self) -> bool:
        """Whether a request of this call is still unfinished."""
        return bool(self.request_ids)

    def note(
        self, live: LiveRequest, token_ids: tuple[int, ...] = (), logprobs: tuple[TokenLogprobs, ...] = ()
    ) -> None:
        """Queue a chunk with what a request gained."""
        if self.is_streaming:
            request = live.request
            self.chunks.append(
                StreamChunk(
                    request.request_id,
                    request.index,
                    live.text.take(),
                    token_ids,
                    request.finish_reason,
                    logprobs if request.sampling.logprobs is not None else None,
                )
            )

    def close(self, output: RequestOutput) -> None:
        """Take the output of a finished request."""
        self.request_ids.discard(output.request_id)
        self.outputs[output.index] = output

    def in_order(self) -> list[RequestOutput]:
        """The outputs in the order of the prompts."""
        return [self.outputs[index] for index in sorted(self.outputs)]


class Outbox:
    """Hands tokens and outputs to the call that asked for them, and keeps the others for `step()`.

    One that `defers` makes the chunks of a step when `catch_up` is called, which is while the next step runs: text
    takes time. The last chunk of a request comes at once.
    """

    def __init__(self, *, defers: bool = False) -> None:
        self._calls: dict[str, Call] = {}
        self._outputs: list[RequestOutput] = []
        self._defers = defers
        self._deferred: list[Advance] = []

    @property
    def has_outputs(self) -> bool:
        """Whether outputs wait for `step()`."""
        return bool(self._outputs)

    def expect(self, request_id: str, call: Call) -> None:
        """Give everything about a request to `call` from now on."""
        call.request_ids.add(request_id)
        self._calls[request_id] = call

    def note(self, advanced: Sequence[Advance]) -> None:
        """Hand on the tokens of a step, before those of the next one are known."""
        for advance in advanced:
            if self._defers and not advance.live.request.is_finished:
                self._deferred.append(advance)
            else:
                self._hand_on(advance)

    def catch_up(self) -> None:
        """Hand on what was deferred. Idempotent."""
        deferred, self._deferred = self._deferred, []
        for advance in deferred:
            self._hand_on(advance)

    def deliver(self, finished: Sequence[LiveRequest]) -> None:
        """Hand on the outputs of finished requests."""
        for live in finished:
            output = output_of(live)
            call = self._calls.pop(output.request_id, None)
            if call is None:
                self._outputs.append(output)
                continue
            if output.finish_reason in ("abort", "rejected"):
                call.note(live)
            call.close(output)

    def take(self) -> list[RequestOutput]:
        """The outputs that no call asked for, once."""
        outputs, self._outputs = self._outputs, []
        return outputs

    def forget(self, request_ids: set[str]) -> None:
        """Stop waiting for these requests."""
        for request_id in request_ids:
            self._calls.pop(request_id, None)

    def _hand_on(self, advance: Advance) -> None:
        call = self._calls.get(advance.live.request.request_id)
        if call is not None:
            call.note(*advance)


def output_of(live: LiveRequest) -> RequestOutput:
    """The output of a finished request."""
    request, text = live
    if request.finish_reason is None:
        raise StateError(
            f"request {request.request_id!r} is {request.status.value}", remedy="only a finished request has an output"
        )
    return RequestOutput(
        request_id=request.request_id,
        index=request.index,
        prompt=request.prompt,
        prompt_token_ids=tuple(request.prompt_token_ids),
        token_ids=tuple(request.output_token_ids),
        text=text.text,
        finish_reason=request.finish_reason,
        stop_reason=request.stop_reason,
        usage=Usage(
            num_prompt_tokens=request.num_prompt_tokens,
            num_generated_tokens=request.num_output_tokens,
            num_preemptions=request.num_preemptions,
            num_recomputed_tokens=request.num_recomputed_tokens,
            num_draft_tokens=request.num_draft_tokens,
            num_accepted_draft_tokens=request.num_accepted_draft_tokens,
            num_cached_tokens=request.num_cached_tokens,
        ),
        error=request.error,
        config_epoch=request.config_epoch,
        logprobs=None if request.sampling.logprobs is None else tuple(request.logprobs),
        prompt_logprobs=None if request.sampling.prompt_logprobs is None else (None, *request.prompt_logprobs),
    )


def rejected(index: int, prompt: Prompt, error: RequestError, *, config_epoch: int) -> RequestOutput:
    """The output of a request that was refused before it was queued."""
    return RequestOutput(
        request_id=f"rejected-{index}",
        index=index,
        prompt=prompt if isinstance(prompt, str) else None,
        prompt_token_ids=(),
        token_ids=(),
        text="",
        finish_reason="rejected",
        error=error,
        config_epoch=config_epoch,
    )


def summary(errors: dict[int, RequestError], num_prompts: int) -> RequestError:
    """One error that names every refused request of a call by its index."""
    lines = [f"prompts[{index}]: {error.message}" for index, error in errors.items()]
    remedies = dict.fromkeys(error.remedy for error in errors.values() if error.remedy)
    head = f"{len(errors)} of {num_prompts} requests cannot be served:"
    return RequestError("\n  ".join([head, *lines]), remedy="; ".join(remedies))
