"""The line of every key of a configuration file, by its path; a key that is given twice is an error."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping

import yaml

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_JSON_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\]:\n]')


def yaml_lines(node: yaml.Node, prefix: str | None = "") -> Iterator[tuple[str, int]]:
    """Path and line of every key of a YAML node; keys below a list (`prefix` is `None`) have no path.

    Raises ValueError for a key given twice.
    """
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from yaml_lines(item, None)
    if not isinstance(node, yaml.MappingNode):
        return
    seen: dict[str, int] = {}
    for key, value in node.value:
        name, line = str(key.value), key.start_mark.line + 1
        _note(seen, name, line, prefix)
        path = _path(prefix, name)
        if path is not None:
            yield path, line
        yield from yaml_lines(value, path)


def json_lines(text: str) -> Iterator[tuple[str, int]]:
    """Path and line of every key of a valid JSON text. Raises ValueError for a key given twice."""
    line, key = 1, ""
    open_paths: list[str | None] = []  # of the objects and lists that the current token lies in
    seen: list[dict[str, int]] = []
    path: str | None = ""
    for token in _JSON_TOKEN.findall(text):
        if token == "\n":
            line += 1
        elif token in ("{", "["):
            open_paths.append(path if token == "{" else None)
            seen.append({})
            path = open_paths[-1]
        elif token in ("}", "]"):
            open_paths.pop()
            seen.pop()
            path = open_paths[-1] if open_paths else ""
        elif token == ":":
            _note(seen[-1], key, line, open_paths[-1])
            path = _path(open_paths[-1], key)
            if path is not None:
                yield path, line
        else:
            key = json.loads(token, strict=False)


def toml_lines(text: str) -> Iterator[tuple[str, int]]:
    """Path and line of every table header and key of a valid TOML text; tomllib says where each statement ends."""
    table = ""
    lines = text.replace("\r\n", "\n").split("\n")
    start = 0
    while start < len(lines):
        end = start + 1
        while (statement := _statement(lines[start:end])) is None and end < len(lines):
            end += 1
        is_header = lines[start].lstrip().startswith("[")
        for path in _paths(statement or {}, "" if is_header else table):
            yield path, start + 1
            table = path if is_header else table
        start = end


def _note(seen: dict[str, int], name: str, line: int, prefix: str | None) -> None:
    """Remember the key of a mapping. Raises ValueError if it had it."""
    if name in seen:
        given = _path(prefix, name) or name
        raise ValueError(f"line {line}: {given} is given a second time (first on line {seen[name]})")
    seen[name] = line


def _path(prefix: str | None, name: str) -> str | None:
    """The path of a key below `prefix`."""
    return None if prefix is None else f"{prefix}.{name}" if prefix else name


def _statement(lines: list[str]) -> dict[str, object] | None:
    """What these lines of TOML say by themselves; `None` where a statement goes on behind them."""
    try:
        return tomllib.loads("\n".join(lines))
    except tomllib.TOMLDecodeError:
        return None


def _paths(tree: Mapping[str, object], prefix: str) -> Iterator[str]:
    """The path of every key, the outer ones first."""
    for name, value in tree.items():
        path = f"{prefix}.{name}" if prefix else name
        yield path
        if isinstance(value, Mapping):
            yield from _paths(value, path)
