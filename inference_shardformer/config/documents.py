"""Configuration files: YAML, JSON or TOML read into a plain mapping that knows the line of every key."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from inference_shardformer.config.scalars import ConfigYamlLoader
from inference_shardformer.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SUFFIXES = (".yaml", ".yml", ".json", ".toml")


@dataclass(frozen=True)
class Document:
    """A file's settings, and the line on which each path is given."""

    name: str
    tree: Mapping[object, object]
    lines: Mapping[str, int]

    def place(self, path: str) -> str:
        """`file:line` of a path, or of the nearest group above it whose line is known."""
        while path and path not in self.lines:
            path = path.rpartition(".")[0]
        return f"{self.name}:{self.lines[path]}" if path else self.name


def read_document(name: str) -> Document:
    """Read one file; its suffix says the format. Raises ConfigError when it cannot be read or parsed."""
    path = Path(name)
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(
            f"configuration file {name}: unknown format {path.suffix or '(no suffix)'}; known: {', '.join(SUFFIXES)}",
            remedy="rename the file so that its suffix says its format",
        )
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as exc:
        raise ConfigError(
            f"configuration file {name}: cannot be read ({exc.strerror})", remedy="check the path given to --config"
        ) from exc
    except UnicodeDecodeError as exc:
        raise ConfigError(f"configuration file {name}: is not UTF-8 text", remedy="save it as UTF-8") from exc
    try:
        tree, lines = _PARSERS[path.suffix.lower()](text)
    except (yaml.YAMLError, ValueError) as exc:
        raise ConfigError(
            f"configuration file {name}: cannot be parsed: {exc}",
            remedy=f"correct the {path.suffix[1:].upper()} syntax",
        ) from exc
    if not isinstance(tree, Mapping):
        raise ConfigError(
            f"configuration file {name}: holds a {type(tree).__name__}, not a mapping",
            remedy="begin with `shard:` or `inference:` and put the settings below",
        )
    return Document(name, tree, lines)


def _parse_yaml(text: str) -> tuple[object, dict[str, int]]:
    """Value of a YAML text (an empty one is an empty mapping) and its lines."""
    loader = ConfigYamlLoader(text)
    node = loader.get_single_node()
    if node is None:
        return {}, {}
    lines = dict(_node_lines(node, ""))
    return loader.construct_document(node), lines


def _parse_json(text: str) -> tuple[object, dict[str, int]]:
    """Value of a JSON text and its lines; YAML's parser finds those, since JSON is YAML but for tabs."""
    tree = json.loads(text)
    node = yaml.compose(text.replace("\t", " "), Loader=ConfigYamlLoader)
    return tree, dict(_node_lines(node, ""))


def _parse_toml(text: str) -> tuple[object, dict[str, int]]:
    """Value of a TOML text and its lines."""
    return tomllib.loads(text), dict(_toml_lines(text))


def _node_lines(node: yaml.Node | None, prefix: str, depth: int = 0) -> Iterator[tuple[str, int]]:
    """Path and line of every key of a YAML mapping. A key given twice is an error. No setting lies deeper than 8."""
    if not isinstance(node, yaml.MappingNode) or depth > 8:
        return
    seen: dict[str, int] = {}
    for key, value in node.value:
        path = f"{prefix}.{key.value}" if prefix else str(key.value)
        line = key.start_mark.line + 1
        if path in seen:
            raise ValueError(f"line {line}: {path} is given a second time (first on line {seen[path]})")
        seen[path] = line
        yield path, line
        yield from _node_lines(value, path, depth + 1)


def _toml_lines(text: str) -> Iterator[tuple[str, int]]:
    """Path and line of every table header and key of a TOML text."""
    table = ""
    for number, line in enumerate(text.splitlines(), start=1):
        header = re.match(r"\s*\[+([^\[\]]+)\]", line)
        key = re.match(r"\s*([\w.\-\"' ]+?)\s*=", line)
        if header:
            table = re.sub(r"[\s\"']", "", header[1])
            yield table, number
        elif key:
            name = re.sub(r"[\s\"']", "", key[1])
            yield (f"{table}.{name}" if table else name), number


_PARSERS = {".yaml": _parse_yaml, ".yml": _parse_yaml, ".json": _parse_json, ".toml": _parse_toml}
