"""Values that are accepted but cannot take effect, because another value or the model leaves them nothing to do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, cast

from inference_shardformer.config.inference import TUNED
from inference_shardformer.config.loader import MergedConfig
from inference_shardformer.config.model import ModelFacts
from inference_shardformer.config.origins import Level
from inference_shardformer.config.violations import Violation, show


class ConfigEvent(NamedTuple):
    """Something that a permissive configuration let pass: a stable code, the path it is about, and a sentence."""

    code: str
    path: str
    message: str


class _Idle(NamedTuple):
    """A value without effect: its path, the setting that takes it away (none: the model does), why, and the remedy."""

    path: str
    because: str
    why: str
    remedy: str


# A seed is never idle: a request that brings a temperature of its own still draws from the engine's seed. Nor is a
# permission (trust_remote_code) that nobody makes use of.
SAMPLING, CACHE, SCHEDULER = "inference.sampling", "inference.cache", "inference.scheduler"


def idle_values(merged: MergedConfig, facts: ModelFacts, max_model_len: int, block_size: int) -> list[Violation]:
    """A violation for every value that somebody asked for and that cannot take effect.

    A value is only idle because of one of the same or a lower level: a higher one has overridden the intention.
    """
    every = _all_idle(merged, facts, max_model_len, block_size)
    return [_violation(merged, idle) for idle in every if _counts(merged, idle)]


def event_of(violation: Violation) -> ConfigEvent:
    """What a permissive configuration records instead of the violation."""
    return ConfigEvent("ineffective_value", violation.path, f"{violation.given} ({violation.origin}): {violation.rule}")


def idle(path: str, value: object, merged: MergedConfig, why: str, remedy: str) -> Violation:
    """The violation of one value that cannot take effect."""
    rule = f"a value that can take effect, but {why}"
    return Violation(
        path, f"{path} = {show(value)}", merged.origin(path), rule, f"{remedy}, or set inference.strict=false"
    )


def _counts(merged: MergedConfig, found: _Idle) -> bool:
    """Whether somebody asked for the value, and nobody overrode it later, and both values are valid."""
    level = merged.origin(found.path).level
    other = merged.origin(found.because).level if found.because else Level.DEFAULT
    return level > Level.PRESET and other <= level and not {found.path, found.because} & merged.refused


def _violation(merged: MergedConfig, found: _Idle) -> Violation:
    source = f" ({found.because.rpartition('.')[2]}: {merged.origin(found.because)})" if found.because else ""
    return idle(found.path, merged.value(found.path), merged, found.why + source, found.remedy)


def _all_idle(merged: MergedConfig, facts: ModelFacts, max_model_len: int, block_size: int) -> Iterator[_Idle]:
    yield from _in_sampling(merged.value, facts, max_model_len)
    yield from _in_capacity(merged.value, max_model_len, block_size)
    backend, profile = (f"inference.attention.{name}" for name in ("backend", "profile"))
    if merged.value(profile) is not None and merged.value(backend) != TUNED:
        why = f"attention.backend is {merged.value(backend)}, and only tuned reads a profile"
        yield _Idle(profile, backend, why, "set attention.backend to tuned, or remove the profile")


def _in_sampling(value: Callable[[str], object], facts: ModelFacts, max_model_len: int) -> Iterator[_Idle]:
    """Sampling that chooses nothing. Values that stand for "off" are never idle."""
    temperature, top_k, top_p = (value(f"{SAMPLING}.{name}") for name in ("temperature", "top_k", "top_p"))
    chosen = {"top_k": top_k != 0, "top_p": top_p != 1.0}
    for name in (name for name, is_on in chosen.items() if is_on and temperature == 0):
        why = "sampling.temperature is 0, which always takes the likeliest token"
        yield _Idle(
            f"{SAMPLING}.{name}", f"{SAMPLING}.temperature", why, f"set a temperature above 0, or remove {name}"
        )
    if top_k == 1 and temperature != 0:
        for name in ("temperature", *(["top_p"] if chosen["top_p"] else [])):
            why = "sampling.top_k is 1, which always takes the likeliest token"
            yield _Idle(f"{SAMPLING}.{name}", f"{SAMPLING}.top_k", why, f"raise top_k, or remove {name}")
    if isinstance(top_k, int) and top_k >= facts.vocab_size:
        why = f"the model has {facts.vocab_size} tokens, so it keeps them all"
        yield _Idle(f"{SAMPLING}.top_k", "", why, "lower it, or set 0, which keeps all")
    if cast(int, value(f"{SAMPLING}.max_new_tokens")) >= max_model_len:
        why = f"max_model_len is {max_model_len}, prompt and output together"
        yield _Idle(f"{SAMPLING}.max_new_tokens", "inference.max_model_len", why, f"use at most {max_model_len - 1}")
    if value(f"{SAMPLING}.ignore_eos") and not facts.eos_token_ids:
        yield _Idle(f"{SAMPLING}.ignore_eos", "", "the model names no end-of-sequence token", "remove it")


def _in_capacity(value: Callable[[str], object], max_model_len: int, block_size: int) -> Iterator[_Idle]:
    """Limits that something else keeps from being reached."""
    seqs, tokens = (cast(int, value(f"{SCHEDULER}.{name}")) for name in ("max_num_seqs", "max_num_batched_tokens"))
    if seqs > tokens:
        why = f"scheduler.max_num_batched_tokens is {tokens}, and every running sequence takes one token of a step"
        remedy = f"use at most {tokens}, or raise max_num_batched_tokens"
        yield _Idle(f"{SCHEDULER}.max_num_seqs", f"{SCHEDULER}.max_num_batched_tokens", why, remedy)
    if value(f"{SCHEDULER}.speculation") == "off":
        why = "scheduler.speculation is off, so nothing is guessed"
        yield _Idle(f"{SCHEDULER}.max_draft_tokens", f"{SCHEDULER}.speculation", why, "set it to prompt_lookup")
    num_blocks = value(f"{CACHE}.num_blocks")
    if not isinstance(num_blocks, int):
        return
    if value(f"{CACHE}.memory_limit") != "auto":
        why = f"cache.num_blocks is {num_blocks}, which alone says how large the cache is"
        yield _Idle(f"{CACHE}.memory_limit", f"{CACHE}.num_blocks", why, "keep one of the two")
    if seqs > num_blocks:
        why = f"cache.num_blocks is {num_blocks}, and every running sequence takes at least one block"
        yield _Idle(
            f"{SCHEDULER}.max_num_seqs", f"{CACHE}.num_blocks", why, f"use at most {num_blocks}, or more blocks"
        )
    longest = num_blocks * block_size + 1  # the last token is never fed back, so the cache never holds it
    if value("inference.max_model_len") != "auto" and max_model_len > longest:
        why = f"{num_blocks} blocks of {block_size} tokens hold no sequence of more than {longest}"
        remedy = f"use at most {longest}, or more blocks"
        yield _Idle("inference.max_model_len", f"{CACHE}.num_blocks", why, remedy)
