"""As much of JSON Schema as docs/config.schema.json uses; an unknown keyword is an error. 2.0 is no integer here."""

from __future__ import annotations

import operator
import re
from typing import Any

_TYPES: dict[str, tuple[type, ...]] = {
    "integer": (int,),
    "number": (int, float),
    "string": (str,),
    "boolean": (bool,),
    "null": (type(None),),
    "object": (dict,),
    "array": (list,),
}
_BOUNDS = {
    "minimum": operator.ge,
    "maximum": operator.le,
    "exclusiveMinimum": operator.gt,
    "exclusiveMaximum": operator.lt,
}
_SILENT = {"description", "default", "title", "$schema", "$id"}
_OTHERS = {
    "type",
    "enum",
    "const",
    "anyOf",
    "minLength",
    "pattern",
    "properties",
    "additionalProperties",
    "propertyNames",
}


def accepts(schema: dict[str, Any], value: object) -> bool:
    """Whether a JSON value follows the schema."""
    unknown = {name for name in schema if not name.startswith("x-")} - _SILENT - _OTHERS - set(_BOUNDS)
    assert not unknown, f"this checker does not know {unknown}"
    kinds = schema.get("type", [*_TYPES])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    return (
        type(value) in {kind for name in kinds for kind in _TYPES[name]}
        and all(value in words for words in [schema.get("enum", [value]), [schema.get("const", value)]])
        and ("anyOf" not in schema or any(accepts(option, value) for option in schema["anyOf"]))
        and _in_bounds(schema, value)
        and (not isinstance(value, dict) or _object_accepts(schema, value))
    )


def _in_bounds(schema: dict[str, Any], value: object) -> bool:
    if isinstance(value, str):
        return len(value) >= schema.get("minLength", 0) and bool(re.search(schema.get("pattern", ""), value))
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return not is_number or all(holds(value, schema[name]) for name, holds in _BOUNDS.items() if name in schema)


def _object_accepts(schema: dict[str, Any], value: dict[str, object]) -> bool:
    others = schema.get("additionalProperties", {})
    others = {} if others is True else others
    known = schema.get("properties", {})
    return all(
        accepts(schema.get("propertyNames", {}), name)
        and (accepts(known[name], item) if name in known else others is not False and accepts(others, item))
        for name, item in value.items()
    )
