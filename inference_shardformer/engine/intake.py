"""Intake: turns what a caller brings into a valid request, or says everything that is wrong with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Integral

from inference_shardformer.config.model import ModelFacts
from inference_shardformer.config.snapshot import ConfigSnapshot
from inference_shardformer.config.store import ConfigStore
from inference_shardformer.config.templates import filled
from inference_shardformer.engine.detokenizer import Tokenizer
from inference_shardformer.engine.sampling_params import ResolvedSampling, SamplingParams, shown
from inference_shardformer.errors import RequestError
from inference_shardformer.kv_cache.sizing import blocks_for

Prompt = str | Sequence[int]
Problem = tuple[str, str]
"""What is wrong, and what to do."""


@dataclass(frozen=True)
class ValidPrompt:
    """A prompt that can be queued: what the user gave, its tokens, and how to sample."""

    prompt: str | None
    token_ids: tuple[int, ...]
    params: SamplingParams


class Intake:
    """The limits of one engine, and the checks against them."""

    def __init__(
        self,
        *,
        facts: ModelFacts,
        config: ConfigStore,
        num_blocks: int,
        block_size: int,
        tokenizer: Tokenizer | None,
    ) -> None:
        self._vocab_size = facts.vocab_size
        self._config = config
        self._num_blocks = num_blocks
        self._block_size = block_size
        self._tokenizer = tokenizer

    @property
    def seed(self) -> int:
        """The seed from which those of requests are derived."""
        return self._config.inference.seed

    def limits(self) -> dict[str, str]:
        """What must be the same on every rank, or they would schedule differently."""
        config = self._config.current
        return {
            "cache.num_blocks": str(self._num_blocks),
            "cache.block_size": str(self._block_size),
            "max_model_len": str(config.config.max_model_len),
            "scheduler.max_num_seqs": str(config.inference.scheduler.max_num_seqs),
            "scheduler.max_num_batched_tokens": str(config.inference.scheduler.max_num_batched_tokens),
            "scheduler.speculation": config.inference.scheduler.speculation,
            "scheduler.max_draft_tokens": str(config.inference.scheduler.max_draft_tokens),
            "cache.prefix_caching": config.config.prefix_caching,
            "tokenizer": "none" if self._tokenizer is None else type(self._tokenizer).__name__,
        }

    def validate(self, prompt: Prompt, params: SamplingParams) -> ValidPrompt:
        """The request that `prompt` and `params` make. Raises `RequestError` with everything that is wrong."""
        if not isinstance(params, SamplingParams):
            raise RequestError(
                f"sampling_params is a {type(params).__name__}", remedy="pass SamplingParams, or None for the defaults"
            )
        token_ids = self._token_ids(prompt)
        sampling, length_problems = self._resolve(len(token_ids), params, self._config.current)
        problems = [
            *self._vocabulary_problems(token_ids, sampling),
            *self._stop_problems(sampling),
            *length_problems,
        ]
        _raise_for(problems)
        return ValidPrompt(prompt if isinstance(prompt, str) else None, token_ids, params)

    def admit(self, num_prompt_tokens: int, params: SamplingParams, snapshot: ConfigSnapshot) -> ResolvedSampling:
        """The sampling of a valid request under the defaults of `snapshot`.

        Raises `RequestError` if these came after its validation and it does not fit any more.
        """
        sampling, problems = self._resolve(num_prompt_tokens, params, snapshot)
        _raise_for(problems)
        return sampling

    def _resolve(
        self, num_prompt_tokens: int, params: SamplingParams, snapshot: ConfigSnapshot
    ) -> tuple[ResolvedSampling, list[Problem]]:
        inference = snapshot.inference
        sampling = params.resolve(inference.sampling, seed=inference.seed)
        limit = snapshot.config.max_model_len
        if params.max_new_tokens is None:
            room = max(1, limit - num_prompt_tokens)
            sampling = replace(sampling, max_new_tokens=min(sampling.max_new_tokens, room))
        problems = self._length_problems(num_prompt_tokens, sampling.max_new_tokens, limit)
        if sampling.min_new_tokens > sampling.max_new_tokens:
            problem = f"min_new_tokens={sampling.min_new_tokens} exceeds max_new_tokens={sampling.max_new_tokens}"
            problems.append((problem, f"lower min_new_tokens to at most {sampling.max_new_tokens}"))
        return sampling, problems

    def _token_ids(self, prompt: Prompt) -> tuple[int, ...]:
        if isinstance(prompt, bytes | bytearray) or not isinstance(prompt, Sequence):
            raise RequestError(
                f"the prompt is a {type(prompt).__name__}",
                remedy="pass text or a list of token ids; a tensor or array becomes one with .tolist()",
            )
        token_ids = self._tokenize(prompt) if isinstance(prompt, str) else _as_integers(prompt)
        if not token_ids:
            raise RequestError(
                "the prompt is empty: it has no token to start from",
                remedy="pass at least one token, for example the beginning-of-sequence token",
            )
        return token_ids

    def _tokenize(self, prompt: str) -> tuple[int, ...]:
        if self._tokenizer is None:
            raise RequestError(
                "the prompt is text, and this engine has no tokenizer",
                remedy="pass token ids, or attach the model with tokenizer=",
            )
        _refuse_half_characters(prompt)
        template = self._config.inference.prompt.template
        return tuple(self._tokenizer.encode(prompt if template is None else filled(template, prompt)))

    def _vocabulary_problems(self, token_ids: tuple[int, ...], sampling: ResolvedSampling) -> list[Problem]:
        valid = f"token ids of this model are 0 to {self._vocab_size - 1}"
        problems = []
        if min(token_ids) < 0 or max(token_ids) >= self._vocab_size:
            position = next(i for i, token in enumerate(token_ids) if not 0 <= token < self._vocab_size)
            problems.append(
                (f"token id {shown(token_ids[position])} at position {position} is not in the vocabulary", valid)
            )
        named = {"stop_token_ids": sampling.stop_token_ids, "logit_bias": [each for each, _ in sampling.logit_bias]}
        for name, ids in named.items():
            if foreign := [token_id for token_id in ids if token_id >= self._vocab_size]:
                problems.append((f"{name}={foreign} are not in the vocabulary", valid))
        for name, num in {"logprobs": sampling.logprobs, "prompt_logprobs": sampling.prompt_logprobs}.items():
            if num is not None and num > self._vocab_size:
                problems.append((f"{name}={num} are more tokens than there are", valid))
        return problems

    def _stop_problems(self, sampling: ResolvedSampling) -> list[Problem]:
        if not sampling.stop or self._tokenizer is not None:
            return []
        return [
            (
                f"stop={list(sampling.stop)} needs text, and this engine has no tokenizer",
                "use stop_token_ids, or attach the model with tokenizer=",
            )
        ]

    def _length_problems(self, num_prompt_tokens: int, max_new_tokens: int, limit: int) -> list[Problem]:
        room = limit - num_prompt_tokens
        if room < 1:
            return [
                (
                    f"the prompt has {num_prompt_tokens} tokens and max_model_len={limit} must hold one more",
                    f"shorten the prompt to at most {limit - 1} tokens, or raise max_model_len",
                )
            ]
        if max_new_tokens > room:
            return [
                (
                    f"{num_prompt_tokens} prompt tokens and max_new_tokens={max_new_tokens} exceed "
                    f"max_model_len={limit}",
                    f"lower max_new_tokens to at most {room}, shorten the prompt, or raise max_model_len",
                )
            ]
        # the last token is never fed back, so the cache never holds it
        num_blocks = blocks_for(num_prompt_tokens + max_new_tokens - 1, self._block_size)
        if num_blocks <= self._num_blocks:
            return []
        largest = self._num_blocks * self._block_size + 1 - num_prompt_tokens
        way_out = f"lower max_new_tokens to at most {largest}" if largest > 0 else "shorten the prompt"
        return [
            (
                f"{num_prompt_tokens} prompt tokens and max_new_tokens={max_new_tokens} need {num_blocks} cache blocks "
                f"of {self._block_size} tokens; the cache has {self._num_blocks}",
                f"{way_out}, or raise cache.num_blocks or cache.memory_limit",
            )
        ]


def pair_prompts(
    prompts: str | Sequence[Prompt], sampling_params: SamplingParams | Sequence[SamplingParams] | None
) -> list[tuple[Prompt, SamplingParams]]:
    """Each prompt with its sampling parameters."""
    wanted: Sequence[Prompt] = [prompts] if isinstance(prompts, str) else prompts
    if not isinstance(wanted, Sequence) or isinstance(wanted, bytes | bytearray) or len(wanted) == 0:
        raise RequestError(
            f"prompts={prompts!r} holds no prompt", remedy="pass a text, or a list with at least one text or id list"
        )
    if all(isinstance(prompt, int) for prompt in wanted):
        raise RequestError("prompts is one flat list of token ids", remedy="pass a list of lists: [[1, 2, 3]]")
    if sampling_params is None or isinstance(sampling_params, SamplingParams):
        params: Sequence[SamplingParams] = [sampling_params or SamplingParams()] * len(wanted)
    elif isinstance(sampling_params, Sequence) and not isinstance(sampling_params, str):
        params = sampling_params
    else:
        raise RequestError(
            f"sampling_params is a {type(sampling_params).__name__}", remedy="pass SamplingParams, or a list of them"
        )
    if len(params) != len(wanted):
        raise RequestError(
            f"{len(params)} sampling_params were given for {len(wanted)} prompts",
            remedy="pass one SamplingParams for all prompts, or exactly one for each",
        )
    return list(zip(wanted, params, strict=True))


def _raise_for(problems: Sequence[Problem]) -> None:
    if problems:
        raise RequestError(
            "; ".join(problem for problem, _ in problems), remedy="; ".join(remedy for _, remedy in problems)
        )


def _refuse_half_characters(prompt: str) -> None:
    """Tokenizers take no text with surrogates, which is what careless decoding makes of foreign bytes."""
    try:
        prompt.encode()
    except UnicodeEncodeError as exc:
        raise RequestError(
            f"the prompt is no Unicode text: {prompt[exc.start]!r} at position {exc.start} is half a character",
            remedy="decode bytes as UTF-8, with errors='replace' where they may hold anything",
        ) from exc


def _as_integers(values: Sequence[int]) -> tuple[int, ...]:
    token_ids = tuple(values)
    if all(type(token_id) is int for token_id in token_ids):
        return token_ids
    for token_id in token_ids:
        if isinstance(token_id, bool) or not isinstance(token_id, Integral):
            raise RequestError(
                f"the prompt holds {token_id!r}, a {type(token_id).__name__}", remedy="token ids are integers"
            )
    return tuple(int(token_id) for token_id in token_ids)
