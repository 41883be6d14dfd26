"""What the engine hands out: outputs of finished requests, chunks of streamed ones, and the facts of a step."""

from __future__ import annotations

from dataclasses import dataclass

from inference_shardformer.engine.logprobs import TokenLogprobs
from inference_shardformer.engine.request import FinishReason
from inference_shardformer.errors import RequestError


@dataclass(frozen=True)
class Usage:
    """What one request cost; `num_recomputed_tokens` were computed again after `num_preemptions` preemptions.

    `num_cached_tokens` of the prompt were found in the prefix cache and not computed. Of the `num_draft_tokens` guesses
    that were verified, `num_accepted_draft_tokens` were right.
    """

    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0
    num_preemptions: int = 0
    num_recomputed_tokens: int = 0
    num_draft_tokens: int = 0
    num_accepted_draft_tokens: int = 0
    num_cached_tokens: int = 0


@dataclass(frozen=True)
class RequestOutput:
    """A finished request.

    `index` is its place in the call that brought it. `finish_reason` is "stop" (an end-of-sequence token, a stop id or
    a stop text), "length", "abort" or "rejected"; `stop_reason` is the stop id or text that was met. `token_ids` are
    the generated ones, the ending one included; `text` ends before a stop text. `error` says why a request was
    rejected, or why it could not go on. `config_epoch` is the epoch of the configuration whose sampling defaults hold
    for it from its first to its last token. `logprobs` belong to `token_ids` one by one; None where nobody asked.
    `prompt_logprobs` belong to `prompt_token_ids`, of which the first has none.
    """

    request_id: str
    index: int
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    stop_reason: str | int | None = None
    usage: Usage = Usage()
    error: RequestError | None = None
    config_epoch: int = 0
    logprobs: tuple[TokenLogprobs, ...] | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None


@dataclass(frozen=True)
class StreamChunk:
    """What one step added to one request. `text` holds whole characters only, so it may lag behind `token_ids`.

    Put together, the chunks of a request are its output. The last one carries the `finish_reason`. `logprobs` belong to
    `token_ids`; None where nobody asked.
    """

    request_id: str
    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    logprobs: tuple[TokenLogprobs, ...] | None = None


@dataclass(frozen=True)
class StepStats:
    """What one step did, and what it left. `config_epoch` is that of the limits it was scheduled with.

    `num_draft_tokens` were verified beside the `num_decode_tokens`. `num_free_blocks` counts those whose contents may
    still be found. Of the `num_queried_tokens` that admitted requests looked for in the prefix cache,
    `num_cached_tokens` were found.
    """

    num_prefill_tokens: int
    num_decode_tokens: int
    num_running: int
    num_waiting: int
    num_free_blocks: int
    seconds: float
    config_epoch: int = 0
    num_draft_tokens: int = 0
    num_queried_tokens: int = 0
    num_cached_tokens: int = 0


@dataclass(frozen=True)
class PrefixCacheStats:
    """What came of the prefix cache since the engine was attached.

    Of the `num_queried_tokens` of requests that were admitted, again after a preemption included, `num_cached_tokens`
    were found. `num_blocks` can be found now, those in use included; `num_reclaimed_blocks` had to give way.
    """

    num_queried_tokens: int
    num_cached_tokens: int
    num_blocks: int
    num_reclaimed_blocks: int
