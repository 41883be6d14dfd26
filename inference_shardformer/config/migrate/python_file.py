"""Foreign configurations in a Python file, found in its syntax tree. Nothing of the file is ever run."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from inference_shardformer.config.migrate.literals import Names, assignments, read_value
from inference_shardformer.config.migrate.sources import ALL_FIELDS, FIELDS, POSITIONS, Entry, ForeignSource
from inference_shardformer.errors import ConfigError

_CONSTRUCTORS = ("from_dict", "from_rpc_param")
_COPIES = ("dataclasses.replace", "copy.replace", "setattr")


def parse_python(text: str, name: str) -> ast.Module:
    """The syntax tree of a file. Raises ConfigError where it is no Python."""
    try:
        return ast.parse(text)
    except (SyntaxError, ValueError) as exc:  # ValueError: a null byte
        line = f":{exc.lineno}" if isinstance(exc, SyntaxError) and exc.lineno else ""
        reason = exc.msg if isinstance(exc, SyntaxError) else str(exc)
        raise ConfigError(
            f"{name}{line}: cannot be parsed as Python: {reason}", remedy="correct the syntax of the file"
        ) from exc


def find_sources(tree: ast.Module, names: Names) -> list[ForeignSource]:
    """Calls of ColossalAI's classes by line; without any, dictionaries that are given a name and hold known fields."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and owner_of(node, names)]
    if calls:
        found = [_read_call(call, names) for call in calls]
        for source, call in zip(found, calls, strict=True):
            source.entries += _later_changes(tree, call, source, names)
    else:
        literals = [value for _, value in assignments(tree) if isinstance(value, ast.Dict)]
        found = [
            source for source in (_read_dict(node, names) for node in literals) if ALL_FIELDS.keys() & source.values
        ]
    return sorted(found, key=lambda source: source.line or 0)


def owner_of(call: ast.Call, names: Names) -> str:
    """The class of ColossalAI's that a call makes; empty for any other call."""
    parts = names.dotted(call.func).split(".")
    if parts[-1] in _CONSTRUCTORS:
        parts.pop()
    is_foreign = len(parts) == 1 or parts[0] == "colossalai"
    return parts[-1] if parts and parts[-1] in FIELDS and is_foreign else ""


def _read_call(call: ast.Call, names: Names) -> ForeignSource:
    """The arguments of one call, by position, by name and from dictionaries."""
    owner = owner_of(call, names)
    takes_dict = isinstance(call.func, ast.Attribute) and call.func.attr in _CONSTRUCTORS
    source = ForeignSource(owner, "mapping" if takes_dict else "call", call.lineno, call.end_lineno)
    if takes_dict:
        for value in [*call.args, *(keyword.value for keyword in call.keywords)]:
            _add_dict(source, value, names)
        return source
    for position, value in enumerate(call.args):
        if position < len(POSITIONS[owner]) and not isinstance(value, ast.Starred):
            _add(source, POSITIONS[owner][position].name, value, names)
        else:
            source.entries.append(_undecided(value, "which fields it gives cannot be decided"))
    for keyword in call.keywords:
        if keyword.arg is None:
            _add_dict(source, keyword.value, names)
        else:
            _add(source, keyword.arg, keyword.value, names)
    return source


def _read_dict(node: ast.Dict, names: Names) -> ForeignSource:
    """A dictionary as a configuration of its own."""
    source = ForeignSource("", "mapping", node.lineno, node.end_lineno)
    _add_dict(source, node, names)
    return source


def _add_dict(source: ForeignSource, node: ast.expr, names: Names) -> None:
    """The items of a dictionary; one that only the running program knows is an entry."""
    literal = names.as_dict(node)
    if literal is None:
        source.entries.append(_undecided(node, "which fields it gives cannot be decided"))
        return
    own: set[str] = set()
    for key, value in zip(literal.keys, literal.values, strict=True):
        if key is None:
            _add_dict(source, value, names)
        elif isinstance(key, ast.Constant) and isinstance(key.value, str):
            if key.value in own:  # within one dictionary the last one counts
                del source.values[key.value]
            own.add(key.value)
            _add(source, key.value, value, names, line=key.lineno)
        else:
            source.entries.append(_undecided(key, "which field it names cannot be decided"))


def _add(source: ForeignSource, name: str, node: ast.expr, names: Names, *, line: int | None = None) -> None:
    """One value; a name given twice, which Python refuses in a call, is an entry."""
    if name in source.values:
        given = f"{name} = {ast.unparse(node)}"
        first = f"is given a second time (first on line {source.lines[name]})"
        source.entries.append(Entry("refused", name, given, node.lineno, first))
        return
    source.values[name] = read_value(node, names)
    source.lines[name] = line or node.lineno


def _later_changes(tree: ast.Module, call: ast.Call, source: ForeignSource, names: Names) -> Iterator[Entry]:
    """Places that change a configuration after it was made, or copy it with other values."""
    bound = {target for target, value in assignments(tree) if value is call}
    why = f"changes the {source}, and when it does cannot be decided"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) in bound:
            yield _undecided(node, why, name=node.attr)
        elif isinstance(node, ast.Call) and names.dotted(node.func) in _COPIES:
            yield from (_undecided(node, why) for copied in node.args[:1] if ast.unparse(copied) in bound)


def _undecided(node: ast.expr, why: str, *, name: str = "") -> Entry:
    text = ast.unparse(node)
    return Entry("undecided", name or text, text, node.lineno, why)
