"""Metadata of a configuration field beside its type: mutability, unit and command-line flag."""

from __future__ import annotations

from pydantic.config import JsonDict


def about(*, mutability: str = "init_only", unit: str = "", flag: str = "") -> JsonDict:
    """What a field declares as its `json_schema_extra`.

    `mutability` is one of `init_only`, `live` and `per_request`; `unit` is what a number counts or measures; `flag` is
    the command-line option that stands for the field.
    """
    return {"mutability": mutability, "unit": unit, "flag": flag}
