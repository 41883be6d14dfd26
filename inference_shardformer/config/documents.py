"""Configuration files: YAML, JSON or TOML read into a plain mapping that knows the line of every key."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from inference_shardformer.config.lines import json_lines, toml_lines, yaml_lines
from inference_shardformer.config.scalars import ConfigYamlLoader, is_nested_too_deeply
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
        text = path.read_text(encoding="utf-8-sig")  # editors of some systems begin a file with a mark
    except OSError as exc:
        raise ConfigError(
            f"configuration file {name}: cannot be read ({exc.strerror})", remedy="check the path given to --config"
        ) from exc
    except UnicodeDecodeError as exc:
        raise ConfigError(f"configuration file {name}: is not UTF-8 text", remedy="save it as UTF-8") from exc
    try:
        tree, lines = _PARSERS[path.suffix.lower()](text)
    except RecursionError as exc:
        raise _too_deep(name) from exc
    except (yaml.YAMLError, ValueError) as exc:
        raise ConfigError(
            f"configuration file {name}: cannot be parsed: {exc}",
            remedy=f"correct the {path.suffix[1:].upper()} syntax",
        ) from exc
    if is_nested_too_deeply(tree):
        raise _too_deep(name)
    if not isinstance(tree, Mapping):
        held = "null" if tree is None else f"a {type(tree).__name__}"
        raise ConfigError(
            f"configuration file {name}: holds {held}, not a mapping",
            remedy="begin with `shard:` or `inference:` and put the settings below",
        )
    return Document(name, tree, lines)


def _too_deep(name: str) -> ConfigError:
    return ConfigError(
        f"configuration file {name}: lists and mappings lie in each other deeper than any setting, or without end",
        remedy="write the settings out; no path in docs/configuration.md is longer than a few names",
    )


def _parse_yaml(text: str) -> tuple[object, dict[str, int]]:
    """Value of a YAML text (an empty one is an empty mapping) and its lines."""
    loader = ConfigYamlLoader(text)
    loader.name = "the file"
    node = loader.get_single_node()
    if node is None:
        return {}, {}
    lines = dict(yaml_lines(node))  # first, since constructing a mapping resolves `<<` in its node
    return loader.construct_document(node), lines


def _parse_json(text: str) -> tuple[object, dict[str, int]]:
    """Value of a JSON text and its lines."""
    return json.loads(text), dict(json_lines(text))


def _parse_toml(text: str) -> tuple[object, dict[str, int]]:
    """Value of a TOML text and its lines."""
    return tomllib.loads(text), dict(toml_lines(text))


_PARSERS = {".yaml": _parse_yaml, ".yml": _parse_yaml, ".json": _parse_json, ".toml": _parse_toml}
