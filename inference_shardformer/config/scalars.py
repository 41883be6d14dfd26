"""Values written as text: how a variable, an option and a YAML file read one."""

from __future__ import annotations

import re
from collections.abc import Mapping

import yaml

_MAX_LEVELS = 32  # of lists and mappings in each other; no setting needs more than a few
_TAG = "tag:yaml.org,2002:"
_SIGN_OR_DIGIT = "-+0123456789"


class ConfigYamlLoader(yaml.SafeLoader):
    """Safe YAML with the scalars of YAML 1.2, which editors and JSON Schema use as well.

    `on` and dates are text, 010 is ten and 1e-3 a number. As in YAML 1.1, `_` may group digits, and `<<` merges.
    """

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 - as the base has it

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """Decimal unless the text begins with 0x or 0o."""
        text = str(self.construct_scalar(node)).replace("_", "")
        return int(text, {"0x": 16, "0o": 8}.get(text.lstrip("+-")[:2], 10))


for _name, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(?:0x[0-9a-fA-F]+|0o[0-7]+|[0-9][0-9_]*)", list(_SIGN_OR_DIGIT)),
    (
        "float",
        r"[-+]?(?:(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN)",
        list(f"{_SIGN_OR_DIGIT}."),
    ),
    ("merge", r"<<", ["<"]),
):
    ConfigYamlLoader.add_implicit_resolver(_TAG + _name, re.compile(rf"^(?:{_pattern})$"), _first)
ConfigYamlLoader.add_constructor(f"{_TAG}int", ConfigYamlLoader.construct_yaml_int)


def parse_scalar(text: str) -> object:
    """A value given as text: a number, true, false or null, a text in quotes, a list or mapping in brackets.

    Everything else is the text itself: nothing in it is a comment or a mapping.
    """
    plain = text.strip()
    try:
        if plain.startswith(("'", '"', "[", "{")):
            value: object = yaml.load(plain, Loader=ConfigYamlLoader)  # a SafeLoader
            return plain if is_nested_too_deeply(value) else value
        loader = ConfigYamlLoader("")
        tag = loader.resolve(yaml.ScalarNode, plain, (True, False))
        is_text = tag in (f"{_TAG}str", f"{_TAG}merge")
        return plain if is_text else loader.construct_object(yaml.ScalarNode(tag, plain))
    except (yaml.YAMLError, ValueError, RecursionError):  # the second: more digits than Python converts
        return plain


def parse_text(text: str) -> object:
    """A value of a text setting given as text: as it is, blanks and brackets and all, or in quotes as YAML reads it.

    Numbers, true, false and null are what they are, so that a text setting refuses them.
    """
    plain = text.strip()
    value = parse_scalar(plain)
    is_quoted = plain.startswith(("'", '"')) and isinstance(value, str)
    return value if is_quoted or value is None or isinstance(value, (bool, int, float)) else text


def is_nested_too_deeply(value: object) -> bool:
    """Whether lists and mappings contain each other deeper than any setting, or without end."""
    return _exceeds(value, _MAX_LEVELS, {})


def _exceeds(value: object, levels: int, passed: dict[int, int]) -> bool:
    """Whether `value` has more levels. `passed` holds what was found to fit, by the levels that were left for it."""
    if not isinstance(value, (Mapping, list, tuple)):
        return False
    if passed.get(id(value), levels + 1) <= levels:
        return False
    children = value.values() if isinstance(value, Mapping) else value
    if levels == 0 or any(_exceeds(child, levels - 1, passed) for child in children):
        return True
    passed[id(value)] = levels
    return False
