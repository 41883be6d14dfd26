"""Scheduler: which requests run in the next step, and with how many tokens."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

from inference_shardformer.config.inference import SchedulerConfig
from inference_shardformer.engine.request import Request, RequestStatus
from inference_shardformer.engine.request_blocks import Looked, RequestBlocks
from inference_shardformer.errors import StateError
from inference_shardformer.kv_cache.block_allocator import BlockAllocator
from inference_shardformer.kv_cache.prefix import PrefixCache

MAX_SCORED_TOKENS = 256
"""Prompt tokens of a step that are followed by log-probabilities: each has a row of logits, which take memory."""


class ScheduledRequest(NamedTuple):
    """A request and how many of its uncomputed tokens run in this step."""

    request: Request
    num_new_tokens: int


@dataclass(frozen=True)
class SchedulerOutput:
    """One step: `scheduled` starts with the `num_decodes` requests that have exactly one token in it.

    Behind them come the `num_drafted` requests that run their last token and guesses at the next ones, which are
    `num_draft_tokens` together; then prompts. `looked` counts what those that were admitted looked for in the prefix
    cache, and found.
    """

    scheduled: list[ScheduledRequest] = field(default_factory=list)
    num_decodes: int = 0
    preempted: list[Request] = field(default_factory=list)
    num_drafted: int = 0
    num_draft_tokens: int = 0

    @property
    def is_decode(self) -> bool:
        """Whether no request runs tokens of which it knows the next one already."""
        return self.num_decode_tokens == len(self.scheduled)

    @property
    def num_decode_tokens(self) -> int:
        """Requests whose last token runs, with or without drafts."""
        return self.num_decodes + self.num_drafted

    looked: Looked = field(default_factory=Looked)

    @property
    def num_tokens(self) -> int:
        """Tokens of the step."""
        return sum(num_new_tokens for _, num_new_tokens in self.scheduled)


class Scheduler:
    """First come, first served, with chunked prefill and preemption by recompute. The same on every rank.

    `running` followed by `waiting` is always in order of arrival: requests are admitted from the front of the waiting
    queue, and the request that arrived last is preempted first, back to that front. So the oldest request always
    moves on, and every request that fits the cache alone finishes.

    Limits are read once a step, so they may change between steps. Where fewer sequences are allowed than run, those
    that run go on to their end and nobody is admitted until then.

    Blocks for all known tokens of a request are taken on admission, and nobody is admitted behind a prompt that does
    not end in the step. Thus at most the last running request is in the middle of its prompt, and only decoding can run
    out of blocks. With a prefix cache a request is admitted with the tokens that are in it computed already, and waits
    for a step, with all behind it, that computes most of the others.
    """

    def __init__(
        self,
        allocator: BlockAllocator,
        *,
        block_size: int,
        prefix_cache: PrefixCache | None = None,
        with_rope_lengths: bool = False,
    ) -> None:
        self.blocks = RequestBlocks(
            allocator, block_size=block_size, prefix_cache=prefix_cache, with_rope_lengths=with_rope_lengths
        )
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []

    @property
    def allocator(self) -> BlockAllocator:
        """Who holds which blocks."""
        return self.blocks.allocator

    @property
    def num_unfinished(self) -> int:
        """Requests that wait or run."""
        return len(self.waiting) + len(self.running)

    def add(self, request: Request) -> None:
        """Queue a request behind all others."""
        self.waiting.append(request)

    def schedule(self, limits: SchedulerConfig) -> SchedulerOutput:
        """Choose the next step within `limits` and take the blocks it needs."""
        scheduled: list[ScheduledRequest] = []
        preempted: list[Request] = []
        looked = Looked()
        self.blocks.keep_computed(self.running)
        budget = self._schedule_running(scheduled, preempted, limits.max_num_batched_tokens)
        if not preempted:
            looked = self._admit(scheduled, budget, limits.max_num_seqs)
        decodes = [entry for entry in scheduled if entry.num_new_tokens == 1]
        prefills = [entry for entry in scheduled if entry.num_new_tokens > 1]
        drafted: list[ScheduledRequest] = []
        if limits.speculation != "off" and not preempted:
            budget = limits.max_num_batched_tokens - sum(num_new_tokens for _, num_new_tokens in scheduled)
            decodes, drafted = self._draft(decodes, limits.max_draft_tokens, budget)
        return SchedulerOutput(
            decodes + drafted + prefills,
            len(decodes),
            preempted,
            num_drafted=len(drafted),
            num_draft_tokens=sum(num_new_tokens - 1 for _, num_new_tokens in drafted),
            looked=looked,
        )

    def expect(self, limits: SchedulerConfig) -> SchedulerOutput | None:
        """The next step as far as it is certain while the present one runs; takes its blocks, as `schedule` would.

        Every running request gets a token, and those leave for which it is the last. None where the next step is not
        decodes alone, may have drafts, or may admit or preempt somebody. A request that leaves earlier gives back its
        blocks with all others, so nothing has to be undone.
        """
        if limits.speculation != "off" or any(request.num_uncomputed_tokens for request in self.running):
            return None
        self.blocks.keep_computed(self.running)
        staying = [request for request in self.running if not _gets_its_last_token(request)]
        if not 0 < len(staying) <= limits.max_num_batched_tokens:
            return None
        has_room = bool(self.waiting) and len(staying) < limits.max_num_seqs
        if has_room and len(staying) < len(self.running):
            return None
        missing = [(request, num) for request in staying if (num := self.blocks.missing(request, 1))]
        if sum(num for _, num in missing) > self.allocator.num_free:
            return None
        for request, num in missing:
            self.blocks.extend(request, num)
        if has_room and self._may_enter(self.waiting[0]):
            return None
        return SchedulerOutput([ScheduledRequest(request, 1) for request in staying], len(staying))

    def finish(self, request: Request) -> None:
        """Take a finished request out and free its blocks, which stay findable until they are needed."""
        if request in self.running:
            self.running.remove(request)
        else:
            self.waiting.remove(request)
        self.blocks.release(request)

    def forget_prefixes(self) -> None:
        """Let no request find what was computed so far; running requests keep their blocks."""
        self.blocks.forget_all(self.running)

    @property
    def blocks_in_use(self) -> list[int]:
        """The blocks that hold keys and values of running requests, each once."""
        return list(dict.fromkeys(block for request in self.running for block in request.block_table))

    def check_integrity(self) -> None:
        """Raise `StateError` if queues, block tables and allocator disagree."""
        self.blocks.check_integrity(self.running)
        for request in self.running:
            if len(request.block_table) * self.blocks.block_size < request.num_computed_tokens:
                raise StateError(
                    f"request {request.request_id!r} has {request.num_computed_tokens} computed tokens in "
                    f"{len(request.block_table)} blocks of {self.blocks.block_size}",
                    remedy="report this as a bug with the stack trace",
                )
        if any(request.block_table or request.num_computed_tokens for request in self.waiting):
            raise StateError("a waiting request holds blocks", remedy="report this as a bug with the stack trace")

    def _schedule_running(self, scheduled: list[ScheduledRequest], preempted: list[Request], budget: int) -> int:
        """Give every running request its tokens, the oldest first; returns what is left of `budget`."""
        position = 0
        while position < len(self.running) and budget > 0:
            request = self.running[position]
            if request.num_computed_tokens == 0:
                self.blocks.renew(request)
            if not self._make_room(request, preempted):
                break
            num_new_tokens = min(_num_runnable(request, MAX_SCORED_TOKENS), budget)
            scheduled.append(ScheduledRequest(request, num_new_tokens))
            budget = budget - num_new_tokens if num_new_tokens == request.num_uncomputed_tokens else 0
            position += 1
        return budget

    def _draft(
        self, decodes: list[ScheduledRequest], most: int, budget: int
    ) -> tuple[list[ScheduledRequest], list[ScheduledRequest]]:
        """Let decodes run guesses at their next tokens, too; those that do not, and those that do.

        Drafts use what is left of the budget, and leave a free block for each running request: nobody waits, or is
        preempted, because of them.
        """
        plain, drafted = [], []
        for entry in decodes:
            request = entry.request
            num_slots = self.blocks.num_slots(request, spare=len(self.running))
            is_at_its_end = request.num_uncomputed_tokens == 1
            num_drafts = request.draft(max(0, min(most, budget, num_slots - 1))) if is_at_its_end else 0
            if not num_drafts:
                plain.append(entry)
                continue
            budget -= num_drafts
            self.blocks.extend(request, self.blocks.missing(request, 1 + num_drafts))
            drafted.append(ScheduledRequest(request, 1 + num_drafts))
        return plain, drafted

    def _make_room(self, request: Request, preempted: list[Request]) -> bool:
        """Take the missing blocks of a running request; False if it had to give way itself."""
        missing = self.blocks.missing(request, request.num_uncomputed_tokens)
        if missing == 0:
            return True
        while missing > self.allocator.num_free and len(self.running) > 1:
            victim = self.running[-1]
            self._preempt(victim)
            preempted.append(victim)
            if victim is request:
                return False
        self.blocks.extend(request, missing)
        return True

    def _preempt(self, request: Request) -> None:
        self.running.pop()
        self.blocks.release(request)
        request.forget_computed()
        request.status = RequestStatus.WAITING
        self.waiting.appendleft(request)

    def _admit(self, scheduled: list[ScheduledRequest], budget: int, max_num_seqs: int) -> Looked:
        """Admit from the front of the queue; what all of them looked for in the prefix cache, and found."""
        looked = Looked()
        if not self.waiting:
            return looked
        to_score = MAX_SCORED_TOKENS - sum(_num_scored(*entry) for entry in scheduled)
        while self.waiting and budget > 0 and len(self.running) < max_num_seqs:
            request = self.waiting[0]
            prefills = (entry for entry in scheduled if entry.num_new_tokens > 1)
            if _num_runnable(request, to_score) == 0 or not self._may_enter(request):
                break
            if self.blocks.should_wait(request, prefills):
                break
            self.waiting.popleft()
            looked = looked.plus(self.blocks.enter(request))
            request.status = RequestStatus.RUNNING
            self.running.append(request)
            num_new_tokens = min(_num_runnable(request, to_score), budget)
            scheduled.append(ScheduledRequest(request, num_new_tokens))
            budget = budget - num_new_tokens if num_new_tokens == request.num_uncomputed_tokens else 0
            to_score -= _num_scored(request, num_new_tokens)
        return looked

    def _may_enter(self, request: Request) -> bool:
        """Whether it fits, and leaves a block for each running request, which would soon preempt it for that."""
        return not self.running or self.blocks.fits(request, spare=len(self.running))


def _gets_its_last_token(request: Request) -> bool:
    """Whether the token that is being sampled is the last that the request may have."""
    return request.num_output_tokens + 1 >= request.sampling.max_new_tokens


def _num_scored(request: Request, num_new_tokens: int) -> int:
    """How many of these tokens are followed by log-probabilities of the prompt."""
    start = request.num_computed_tokens
    return len(request.unscored_positions(start, start + num_new_tokens))


def _num_runnable(request: Request, to_score: int) -> int:
    """How many tokens of a request may run where at most `to_score` are followed by log-probabilities."""
    if request.sampling.prompt_logprobs is None:
        return request.num_uncomputed_tokens
    unscored = request.unscored_positions(request.num_computed_tokens, request.num_tokens)
    if len(unscored) <= to_score:
        return request.num_uncomputed_tokens
    return unscored.start + to_score - request.num_computed_tokens
