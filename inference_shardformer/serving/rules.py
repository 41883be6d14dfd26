"""Rules: what a field of a request may hold, in words and as a test."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple


class Rule(NamedTuple):
    """What a value must be."""

    words: str
    holds: Callable[[object], bool]


def integer(*, low: int, below: int | None = None) -> Rule:
    """An integer from `low` on."""
    bound = "" if below is None else f", below {below}"
    return Rule(
        f"an integer, at least {low}{bound}",
        lambda value: is_integer(value) and low <= value and (below is None or value < below),  # type: ignore[operator]
    )


def number(words: str, holds: Callable[[float], bool]) -> Rule:
    """A finite number for which `holds`."""

    def check(value: object) -> bool:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        try:
            return math.isfinite(value) and holds(float(value))
        except OverflowError:  # an integer beyond every float
            return False

    return Rule(words, check)


def is_integer(value: object) -> bool:
    """Whether it is an integer; JSON's true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_text(value: object) -> bool:
    """Whether it is text that can be encoded; JSON may hold halves of surrogate pairs, which cannot."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_token_ids(value: object) -> bool:
    """Whether it is a list of integers, with at least one of them."""
    return isinstance(value, list) and bool(value) and all(map(is_integer, value))


def is_list_of(holds: Callable[[object], bool], value: object) -> bool:
    """Whether it is a list with at least one item, all of which are such."""
    return isinstance(value, list) and bool(value) and all(map(holds, value))


def one_or_more_texts(value: object) -> bool:
    """Whether it is a text, or a list of texts, none of them empty."""
    texts = value if isinstance(value, list) else [value]
    return all(is_text(text) and bool(text) for text in texts)


def is_bias(value: object) -> bool:
    """Whether it is an object of numbers from -100 to 100 by token ids, which JSON writes as texts."""
    number_rule = number("", lambda each: abs(each) <= 100)
    return isinstance(value, dict) and all(
        token_id.isascii() and token_id.isdecimal() and str(int(token_id[:20])) == token_id and number_rule.holds(each)
        for token_id, each in value.items()
    )


BIAS = Rule("an object of numbers from -100 to 100 by token ids", is_bias)
FLAG = Rule("true or false", lambda value: isinstance(value, bool))
TEXT = Rule("text", is_text)
STOP = Rule("a text or a list of texts, none of them empty", one_or_more_texts)
TOKEN_IDS = Rule(
    "a list of integers, each at least 0",
    lambda value: isinstance(value, list) and all(is_integer(token_id) and token_id >= 0 for token_id in value),
)
PROMPT = Rule(
    "text, a list of texts, a list of token ids, or a list of such lists",
    lambda value: (
        is_text(value) or is_token_ids(value) or is_list_of(is_text, value) or is_list_of(is_token_ids, value)
    ),
)
