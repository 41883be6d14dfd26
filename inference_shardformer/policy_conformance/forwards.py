"""What a forward must not do: choose. A backend, a kernel or a size is bound when a module is built."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator

from torch import nn

_THEIRS = ("torch", "transformers", "inference_shardformer")
_LOOKUPS = frozenset(
    {
        "environ",
        "getenv",
        "is_available",
        "find_spec",
        "import_module",
        "get_device_capability",
        "hasattr",
        "__import__",
    }
)


def foreign_modules(model: nn.Module) -> Iterator[type[nn.Module]]:
    """The module classes in a sharded model that the policy's author wrote."""
    classes = dict.fromkeys(type(module) for module in model.modules())
    return (each for each in classes if each.__module__.partition(".")[0] not in _THEIRS)


def choices_of(module_class: type[nn.Module]) -> list[str]:
    """Imports, look-ups and comparisons with names in the source of a class's forward."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(module_class.forward)))
    return [choice for node in ast.walk(tree) for choice in _choices(node)]


def _choices(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import | ast.ImportFrom):
        yield "an import"
    elif isinstance(node, ast.Attribute) and node.attr in _LOOKUPS:
        yield node.attr
    elif isinstance(node, ast.Name) and node.id in _LOOKUPS:
        yield node.id
    elif isinstance(node, ast.Compare):
        for side in (node.left, *node.comparators):
            if isinstance(side, ast.Constant) and isinstance(side.value, str):
                yield f"a comparison with {side.value!r}"
