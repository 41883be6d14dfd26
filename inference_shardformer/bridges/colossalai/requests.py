"""What ColossalAI's scripts hand to `generate`, put into our terms: prompts, request ids, a GenerationConfig."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, cast

from inference_shardformer.engine.sampling_params import SamplingParams
from inference_shardformer.errors import RequestError

if TYPE_CHECKING:
    from transformers import GenerationConfig

TokenIds = list[int]
_SERVED = frozenset(
    {"max_length", "max_new_tokens", "do_sample", "temperature", "top_k", "top_p", "repetition_penalty"}
    | {"no_repeat_ngram_size", "stop_strings"}
)
_MEANINGLESS = frozenset(  # what a configuration carries along, or what generation here never depends on
    {"transformers_version", "_from_model_config", "bos_token_id", "eos_token_id", "pad_token_id", "use_cache"}
    | {"early_stopping", "length_penalty", "cache_implementation", "cache_config", "return_dict_in_generate"}
)


class Batch(NamedTuple):
    """The requests of one call. `ids` are in the order of the prompts; ColossalAI returns results by their order."""

    prompts: list[str | TokenIds]
    ids: list[int] | None


def read_batch(request_ids: object, prompts: object, prompts_token_ids: object) -> Batch | None:
    """The requests of a call, `None` if it brings none.

    Prompts given first by position, which ColossalAI took for request ids and then returned [] for (B11), are prompts.
    Raises `RequestError` where the arguments do not fit together.
    """
    if prompts is None and prompts_token_ids is None and _are_texts(request_ids):
        request_ids, prompts = None, request_ids
    wanted = _token_lists(prompts_token_ids) if prompts_token_ids is not None else _texts(prompts)
    ids = _ids(request_ids)
    if wanted is None:
        if ids is not None:
            raise RequestError(
                f"request_ids={ids} came without prompts", remedy="give prompts, or prompts_token_ids, with them"
            )
        return None
    if ids is not None and (len(ids) != len(wanted) or len(set(ids)) != len(ids)):
        raise RequestError(
            f"{len(ids)} request ids, {len(set(ids))} of them different, for {len(wanted)} prompts",
            remedy="give every prompt one id of its own, or no ids at all",
        )
    return Batch(wanted, ids)


def sampling_of(config: GenerationConfig | None, num_prompt_tokens: int) -> SamplingParams:
    """The sampling of one request by a GenerationConfig, which holds for its call alone (B12).

    max_new_tokens counts, where it is given; else max_length less the prompt, unless that is transformers' default, 20
    in older versions, which nobody asked for (B10). Raises `RequestError` for what is not served, or leaves no token.
    """
    if config is None:
        return SamplingParams()
    given = config.to_diff_dict()
    unserved = [f"{name}={value!r}" for name, value in given.items() if name not in _SERVED | _MEANINGLESS]
    if unserved:
        raise RequestError(
            f"GenerationConfig asks for what is not served: {', '.join(sorted(unserved))}",
            remedy=f"leave these out; served are {', '.join(sorted(_SERVED))}",
        )
    samples = bool(config.do_sample)
    return SamplingParams(
        max_new_tokens=max_new_tokens(given.get("max_new_tokens"), given.get("max_length"), num_prompt_tokens),
        temperature=(1.0 if config.temperature is None else config.temperature) if samples else 0.0,
        top_k=(50 if config.top_k is None else config.top_k) if samples else None,
        top_p=config.top_p if samples else None,
        repetition_penalty=given.get("repetition_penalty"),
        no_repeat_ngram_size=given.get("no_repeat_ngram_size"),
        stop=given.get("stop_strings") or (),
    )


def max_new_tokens(new_tokens: int | None, length: int | None, num_prompt_tokens: int) -> int | None:
    """How many tokens to generate; `None` stands for the engine's default."""
    if new_tokens is not None or length is None:
        return new_tokens
    if length <= num_prompt_tokens:
        raise RequestError(
            f"max_length={length} leaves no token to generate after a prompt of {num_prompt_tokens}",
            remedy="give max_new_tokens, which counts generated tokens alone",
        )
    return length - num_prompt_tokens


def _are_texts(value: object) -> bool:
    return isinstance(value, str) or (
        isinstance(value, Sequence) and bool(value) and all(isinstance(item, str) for item in value)
    )


def _texts(prompts: object) -> list[str | TokenIds] | None:
    if prompts is None:
        return None
    if not _are_texts(prompts):
        raise RequestError(
            f"prompts={prompts!r} is neither a text nor a list of texts", remedy="give token ids as prompts_token_ids"
        )
    return [prompts] if isinstance(prompts, str) else list(cast("Sequence[str]", prompts))


def _token_lists(given: object) -> list[str | TokenIds]:
    """Token ids of several prompts, or of one: lists, tensors or arrays."""
    plain = given.tolist() if hasattr(given, "tolist") else given
    if isinstance(plain, Sequence) and not isinstance(plain, str):
        rows = [item.tolist() if hasattr(item, "tolist") else item for item in plain]
        if rows and all(isinstance(row, int) for row in rows):
            return [cast("TokenIds", rows)]
        if rows and all(isinstance(row, Sequence) and not isinstance(row, str) for row in rows):
            return [[int(token) for token in row] for row in rows]
    raise RequestError(
        f"prompts_token_ids={given!r} holds no token ids",
        remedy="give a list of lists of integers, or a tensor of them",
    )


def _ids(request_ids: object) -> list[int] | None:
    if request_ids is None:
        return None
    ids = [request_ids] if isinstance(request_ids, int) else request_ids
    if isinstance(ids, Sequence) and not isinstance(ids, str) and all(isinstance(each, int) for each in ids):
        return list(ids)
    raise RequestError(
        f"request_ids={request_ids!r} must be integers", remedy="prompts are the argument after them, prompts=..."
    )
