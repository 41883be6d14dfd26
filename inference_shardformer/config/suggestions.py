"""What a refused value may have meant: the nearest word, or the number in the unit of its field."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from functools import reduce

from pydantic import ValidationError

from inference_shardformer.config.fields import ROOTS, ConfigField
from inference_shardformer.config.scalars import parse_scalar
from inference_shardformer.config.units import converted

_OTHER_WORDS: Mapping[str, tuple[object, ...]] = {
    "float16": ("fp16",),
    "half": ("fp16",),
    "bfloat16": ("bf16",),
    "float32": ("fp32",),
    "float": ("fp32",),
    "gpu": ("cuda",),
    "true": ("on",),
    "yes": (True, "on"),
    "on": (True,),
    "1": (True,),
    "false": ("off",),
    "no": (False, "off"),
    "off": (False,),
    "0": (False,),
}


def meant(field: ConfigField, value: object) -> str:
    """What `value` may have meant, as it is written in a file; empty where nothing near would be accepted."""
    for candidate, unit in _candidates(field, value):
        if _accepts(field, candidate):
            shown = str(candidate).lower() if isinstance(candidate, bool) else str(candidate)
            return f"{shown} ({unit})" if unit else shown
    return ""


def _candidates(field: ConfigField, value: object) -> Iterator[tuple[object, str]]:
    """Values that are near to a refused one, the likeliest first, each with the unit that it was converted to."""
    if isinstance(value, float) and value.is_integer():
        yield int(value), ""
    if isinstance(value, (bool, int)) and field.is_text:
        yield f"'{str(value).lower()}'", ""
    if isinstance(value, (bool, int)):
        yield from ((word, "") for word in _OTHER_WORDS.get(str(value).lower(), ()))
    if not isinstance(value, str):
        return
    word = value.strip().lower()
    yield parse_scalar(value), ""
    yield word, ""
    yield from ((other, "") for other in _OTHER_WORDS.get(word.removeprefix("torch."), ()))
    yield from ((near, "") for near in difflib.get_close_matches(word, field.choices, n=1))
    number = converted(value, field.unit)
    yield number, "a fraction" if "%" in value and "fraction" in field.unit else field.unit.partition(",")[0]


def _accepts(field: ConfigField, value: object) -> bool:
    """Whether the field accepts a value that is not null."""
    root, *names = field.path.split(".")
    tree: object = reduce(lambda below, name: {name: below}, reversed(names), value)
    try:
        ROOTS[root].model_validate(tree)
    except ValidationError:
        return False
    return value is not None
