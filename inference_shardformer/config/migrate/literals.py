"""Values of a Python file read from its syntax alone: literals and torch's types; everything else is undecided."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator

from inference_shardformer.config.migrate.fates import Undecided

_TORCH_TYPES = frozenset(
    f"torch.{name}"
    for name in (
        "float16",
        "half",
        "bfloat16",
        "float32",
        "float",
        "float64",
        "double",
        "int8",
        "uint8",
        "int32",
        "int64",
    )
)


_MUTATORS = frozenset({"update", "pop", "popitem", "setdefault", "clear"})


class Names:
    """What the names of one file stand for: imported ones in full, and dictionaries assigned exactly once."""

    def __init__(self, tree: ast.Module) -> None:
        self._imported = dict(_imports(tree))
        self._dicts: dict[str, ast.Dict] = {}
        counts = Counter(_changed(tree))
        for target, value in assignments(tree):
            if isinstance(value, ast.Dict) and counts[target] == 1:
                self._dicts[target] = value

    def dotted(self, node: ast.expr) -> str:
        """`colossalai.inference.InferenceConfig` for any way to write it; empty for no dotted name."""
        if isinstance(node, ast.Name):
            return self._imported.get(node.id, node.id)
        if isinstance(node, ast.Attribute):
            owner = self.dotted(node.value)
            return f"{owner}.{node.attr}" if owner else ""
        return ""

    def as_dict(self, node: ast.expr) -> ast.Dict | None:
        """A dictionary in place, or the one that a name is given if nothing in the file changes it."""
        return node if isinstance(node, ast.Dict) else self._dicts.get(ast.unparse(node))


def read_value(node: ast.expr, names: Names) -> object:
    """The value of an expression without running it: a literal, the name of a torch type as text, or `Undecided`."""
    dotted = names.dotted(node)
    if dotted in _TORCH_TYPES:
        return dotted
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):
        return Undecided(ast.unparse(node))


def assignments(tree: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    """Every target that is assigned to, as text, with the expression it is given."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            yield from ((ast.unparse(target), node.value) for target in node.targets)
        elif isinstance(node, (ast.AnnAssign, ast.AugAssign, ast.NamedExpr)) and node.value is not None:
            yield ast.unparse(node.target), node.value


def _imports(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Every imported name of a file and what it stands for."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield (alias.asname, alias.name) if alias.asname else (alias.name.split(".")[0],) * 2
        elif isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                yield alias.asname or alias.name, f"{node.module}.{alias.name}"


def _changed(tree: ast.Module) -> Iterator[str]:
    """Every name that is given a value or changed in place, once for each time, in whatever scope."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Store):
            yield ast.unparse(node)
        elif isinstance(node, ast.Subscript) and not isinstance(node.ctx, ast.Load):
            yield ast.unparse(node.value)
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _MUTATORS:
            yield ast.unparse(node.func.value)
