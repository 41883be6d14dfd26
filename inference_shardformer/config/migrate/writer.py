"""Settings as the text of a YAML, JSON or TOML file. The same settings always give the same text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import yaml

from inference_shardformer.config.documents import SUFFIXES
from inference_shardformer.config.scalars import ConfigYamlLoader
from inference_shardformer.errors import ConfigError

_UNSAFE = re.compile("[\x7f-\x9f\u2028\u2029\ud800-\udfff\ufeff\ufffe\uffff]")


class _Dumper(yaml.SafeDumper):
    """Quotes every text that our loader would otherwise take for a number."""

    yaml_implicit_resolvers = ConfigYamlLoader.yaml_implicit_resolvers


def suffix_of(name: str) -> str:
    """The suffix of a file to write. Raises ConfigError where it names no format."""
    suffix = Path(name).suffix.lower()
    if suffix not in SUFFIXES:
        raise ConfigError(
            f"--to {name}: unknown format {suffix or '(no suffix)'}; known: {', '.join(SUFFIXES)}",
            remedy="give the file a suffix that says its format",
        )
    return suffix


def write_text(tree: Mapping[object, object], suffix: str) -> str:
    """The text of a file of the format that `suffix` says."""
    if suffix == ".json":
        return _json(tree, indent=2) + "\n"
    if suffix == ".toml":
        return "\n".join(_toml_lines(tree, "")).lstrip("\n") + "\n"
    return yaml.dump(dict(tree), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=4096)


def _toml_lines(tree: Mapping[object, object], table: str) -> Iterator[str]:
    """A table: its values first, then the tables below it. A null, which TOML lacks, is left out: it is a default."""
    for key, value in tree.items():
        if not isinstance(value, Mapping) and value is not None:
            yield f"{_toml_key(key)} = {_toml_value(value)}"
    for key, value in tree.items():
        if isinstance(value, Mapping):
            path = f"{table}.{_toml_key(key)}" if table else _toml_key(key)
            yield f"\n[{path}]"
            yield from _toml_lines(value, path)


def _toml_key(key: object) -> str:
    return str(key) if re.fullmatch(r"[A-Za-z0-9_-]+", str(key)) else _json(str(key))


def _toml_value(value: object) -> str:
    """A value; JSON writes texts, numbers and booleans as TOML reads them."""
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_toml_value, value))}]"
    return _json(value)


def _json(value: object, *, indent: int | None = None) -> str:
    """JSON in which characters are escaped that YAML and TOML forbid, or take for the end of a line."""
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    return _UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
