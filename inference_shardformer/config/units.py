"""Units that people write behind numbers: what the number is in the unit of a field."""

from __future__ import annotations

import re

_BYTES = {
    f"{prefix}{suffix}": base**power
    for power, prefix in enumerate(["", "k", "m", "g", "t"])
    for suffix, base in (("b", 1000), ("ib", 1024), ("", 1024))
}
_SECONDS = {"ms": 0.001, "s": 1, "sec": 1, "seconds": 1, "m": 60, "min": 60, "minutes": 60, "h": 3600}
_QUANTITY = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]+|%)\s*")


def converted(text: str, unit: str) -> int | float | None:
    """The number that `text` means in `unit`, which is that of a field; `None` where it means none."""
    match = _QUANTITY.fullmatch(text)
    if match is None:
        return None
    number, word = float(match[1]), match[2].lower()
    if word == "%":
        return number / 100 if "fraction" in unit or unit == "probability" else None
    if unit.startswith("bytes") and word in _BYTES:
        return int(number * _BYTES[word])
    if unit == "seconds" and word in _SECONDS:
        return number * _SECONDS[word]
    return _plain(number) if word.rstrip("s") == unit.rstrip("s") else None


def _plain(number: float) -> int | float:
    return int(number) if number.is_integer() else number
