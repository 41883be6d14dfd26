"""Request: the state of one sequence while the engine works on it."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from enum import Enum
from typing import Literal

from inference_shardformer.engine.logprobs import TokenLogprobs
from inference_shardformer.engine.sampling_params import ResolvedSampling
from inference_shardformer.engine.speculative import PromptLookup, num_accepted
from inference_shardformer.errors import RequestError
from inference_shardformer.kv_cache.prefix import PrefixNode

FinishReason = Literal["stop", "length", "abort", "rejected"]


class RequestStatus(Enum):
    """Where a request stands; preemption leads back from running to waiting."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Request:
    """One sequence: its tokens, how many of them the cache holds, and the blocks that hold them.

    token_ids      prompt ............... | output ......
    num_computed_tokens  ^ keys and values up to here are in the cache

    `config_epoch` is that of the configuration it was admitted with, whose defaults are in `sampling`. `logprobs` has
    an entry for each output token where they were asked for, else it stays empty; `prompt_logprobs` the same of each
    prompt token but the first, as far as the prompt has run. `drafts` are the guesses that run in the present step
    behind the last token. `kept` has the nodes of its first blocks in the prefix cache, if it takes part in it.
    """

    def __init__(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        sampling: ResolvedSampling,
        *,
        prompt: str | None = None,
        index: int = 0,
        config_epoch: int = 0,
        rope_switch_length: int | None = None,
    ) -> None:
        self.request_id = request_id
        self.prompt = prompt
        self.index = index
        self.sampling = sampling
        self.config_epoch = config_epoch
        self.rope_switch_length = rope_switch_length
        self.token_ids = list(prompt_token_ids)
        self.num_prompt_tokens = len(self.token_ids)
        self.num_computed_tokens = 0
        self.block_table = array("i")
        self.kept: list[PrefixNode] | None = None
        self.status = RequestStatus.WAITING
        self.finish_reason: FinishReason | None = None
        self.stop_reason: str | int | None = None
        self.error: RequestError | None = None
        self.num_preemptions = 0
        self.num_recomputed_tokens = 0
        self.logprobs: list[TokenLogprobs] = []
        self.drafts: Sequence[int] = ()
        self.lookup: PromptLookup | None = None
        self.num_draft_tokens = 0
        self.num_accepted_draft_tokens = 0
        self.prompt_logprobs: list[TokenLogprobs] = []
        self.num_cached_tokens = 0
        self._num_forgotten: int | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens known so far, prompt and output."""
        return len(self.token_ids)

    @property
    def num_uncomputed_tokens(self) -> int:
        """Known tokens whose keys and values are not in the cache yet."""
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def prompt_token_ids(self) -> list[int]:
        """The prompt's tokens."""
        return self.token_ids[: self.num_prompt_tokens]

    @property
    def output_token_ids(self) -> list[int]:
        """The tokens generated so far."""
        return self.token_ids[self.num_prompt_tokens :]

    def unscored_positions(self, start: int, end: int) -> range:
        """The tokens of `[start, end)` after which the next one of the prompt has yet to get its log-probability."""
        if self.sampling.prompt_logprobs is None:
            return range(0)
        return range(max(start, len(self.prompt_logprobs)), min(end, self.num_prompt_tokens - 1))

    @property
    def is_finished(self) -> bool:
        """Whether nothing more will be generated."""
        return self.status is RequestStatus.FINISHED

    def rope_lengths(self, start: int, end: int) -> list[int]:
        """The sequence length that the rotary frequencies of tokens `[start, end)` see.

        The whole prompt for its own tokens, `position + 1` for a generated one; so neither chunks, nor preemption, nor
        company change it. Beyond `rope_switch_length` all tokens see the same.
        """
        if self.rope_switch_length is not None and self.num_tokens > self.rope_switch_length:
            return [self.rope_switch_length + 1] * (end - start)
        num_prompt = max(0, min(end, self.num_prompt_tokens) - start)
        return [self.num_prompt_tokens] * num_prompt + list(range(start + num_prompt + 1, end + 1))

    def rope_key(self, start: int, end: int) -> tuple[int, ...]:
        """Two requests whose tokens `[start, end)` have the same of it see the same rotary frequencies there."""
        if self.rope_switch_length is not None:
            return (int(self.num_tokens > self.rope_switch_length),)
        return tuple(self.rope_lengths(start, end))

    def append(self, token_id: int, logprobs: TokenLogprobs | None = None) -> None:
        """Add a generated token. The one that crosses `rope_switch_length` lets all be computed again, in place."""
        self.token_ids.append(token_id)
        if logprobs is not None:
            self.logprobs.append(logprobs)
        if self.num_tokens - 1 == self.rope_switch_length:
            self._compute_again()

    def draft(self, most: int) -> int:
        """Guess up to `most` next tokens, all of which could still be generated; returns how many there are."""
        most = max(0, min(most, self.sampling.max_new_tokens - self.num_output_tokens - 1))
        if self.rope_switch_length is not None and self.num_tokens <= self.rope_switch_length:
            most = min(most, self.rope_switch_length - self.num_tokens)  # beyond it all would see other frequencies
        if self.lookup is None:
            self.lookup = PromptLookup(self.token_ids)
        self.drafts = self.lookup.propose(most)
        return len(self.drafts)

    def verify(self, token_ids: Sequence[int]) -> int:
        """How many count of the tokens that were chosen behind the last one and behind each draft.

        The first does, and each that follows a right draft. Nothing stays drafted.
        """
        if not self.drafts or self.lookup is None:
            return len(token_ids)
        accepted = num_accepted(self.drafts, token_ids)
        self.num_draft_tokens += len(self.drafts)
        self.num_accepted_draft_tokens += accepted
        self.lookup.settle(len(self.drafts), accepted)
        self.drafts = ()
        return accepted + 1

    def forget_computed(self) -> None:
        """Note that the cache no longer holds anything of this request."""
        self.num_preemptions += 1
        self._compute_again()

    def start_from(self, num_tokens: int) -> None:
        """Note that the cache holds the first `num_tokens` already; for a preempted request, still or again."""
        self.num_computed_tokens = num_tokens
        if self._num_forgotten is None:
            self.num_cached_tokens = num_tokens
        else:
            self.num_recomputed_tokens -= min(num_tokens, self._num_forgotten)

    def _compute_again(self) -> None:
        self._num_forgotten = self.num_computed_tokens
        self.num_recomputed_tokens += self.num_computed_tokens
        self.num_computed_tokens = 0

    def finish(self, reason: FinishReason, stop_reason: str | int | None = None) -> None:
        """End this request; its blocks are given back by the scheduler."""
        self.status = RequestStatus.FINISHED
        self.finish_reason = reason
        self.stop_reason = stop_reason


class DraftedRow:
    """A request as it is if its first `num_right` drafts are right: what the token behind them is chosen for."""

    def __init__(self, request: Request, num_right: int) -> None:
        self._request = request
        self._num_right = num_right
        self.sampling = request.sampling

    @property
    def token_ids(self) -> list[int]:
        """The known tokens and those drafts."""
        return [*self._request.token_ids, *self._request.drafts[: self._num_right]]

    @property
    def output_token_ids(self) -> list[int]:
        """The tokens generated by then."""
        return [*self._request.output_token_ids, *self._request.drafts[: self._num_right]]

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated by then."""
        return self._request.num_output_tokens + self._num_right


SampledRow = Request | DraftedRow
"""Whom a row of logits is for."""
