"""Who may import whom, read from the source: imports point one way, and importing the package is cheap."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = "inference_shardformer"
FOLDERS = {PACKAGE: ROOT / PACKAGE, f"{PACKAGE}.policies": ROOT / "policies", f"{PACKAGE}.kernels": ROOT / "kernels"}
BASE = {"config", "errors"}
# Part of the package -> the parts it may import. `errors` and `config` hold values only.
ALLOWED = {
    "errors": set(),
    "config": {"errors"},
    "plugins": {"errors"},
    "kernels": set(),
    "distributed": {"errors", "kernels"},  # sums through shared memory are native
    "kv_cache": BASE | {"kernels"},  # memory that is touched only when it is written
    "layers": {"compute", "distributed", "kernels", "errors"},
    "probing": set(),
    "attention": BASE | {"kernels", "kv_cache", "plugins", "probing"},
    "compute": {"attention", "distributed", "kernels", "kv_cache", "plugins", "probing", "errors"},
    "sharding": BASE | {"distributed"},
    "modeling": {"compute", "layers", "attention", "distributed", "kv_cache", "errors"},
    "policies": BASE | {"modeling", "layers", "sharding", "plugins", "attention", "compute", "distributed"},
    "conformance": {"attention", "kv_cache", "errors"},
    "engine": BASE | {"attention", "compute", "kv_cache", "distributed"},  # of compute, what chooses tokens
    "serving": {"__init__", "engine", "errors"},
    # The command line speaks through public names; beside them it reads a model's facts and starts ranks.
    "cli": BASE
    | {
        "__init__",
        "distributed",
        "engine",
        "policies",
        "huggingface",
        "importing",
        "doctor",
        "probing",
        "explaining",
        "planning",
        "resolving",
        "serving",
        "tuning",
    },
}
FORBIDDEN_INSIDE = {
    "modeling": ("attention.selector", "attention.sdpa", "attention.reference"),
    "engine": ("attention.selector", "attention.sdpa", "attention.reference"),
    "policies": ("attention.selector", "attention.sdpa", "attention.reference"),
    "serving": ("engine.engine", "engine.core", "engine.scheduler", "engine.desk", "engine.stepper"),
    "cli": ("engine.engine", "engine.core", "engine.scheduler", "distributed.tensor_parallel", "distributed.guard"),
}
# Names that must not be needed to import the package or the configuration.
HEAVY = (
    "transformers",
    "triton",
    "torch",
    "numpy",
    "flash_attn",
    "flashinfer",
    "colossalai",
    "rich",
    "starlette",
    "uvicorn",
    "prometheus_client",
)


def source_files() -> list[tuple[str, Path]]:
    """Import name and path of every source file of the package."""
    found = []
    for prefix, folder in FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            found.append((".".join([prefix, *parts]), path))
    return found


def imports_of(path: Path) -> list[tuple[str, int]]:
    """Absolute names that a file imports anywhere, with their line. Imports for annotations alone do not count."""
    found = []
    stack: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while stack:
        node = stack.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            stack += node.orelse
            continue
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} is a relative import"
            found += [(f"{node.module}.{alias.name}", node.lineno) for alias in node.names]
        stack += ast.iter_child_nodes(node)
    return found


def part_of(name: str) -> str:
    """The part of the package that an absolute name belongs to: its folder or its top-level file."""
    parts = name.split(".")
    is_part = len(parts) > 1 and any(
        (folder / f"{parts[1]}.py").exists() or (folder / parts[1]).is_dir() for folder in (ROOT / PACKAGE, ROOT)
    )
    return parts[1] if is_part else "__init__"


SOURCES = source_files()


@pytest.mark.parametrize(("name", "path"), SOURCES, ids=[name for name, _ in SOURCES])
def test_imports_point_one_way(name, path):
    part = part_of(name)
    if part not in ALLOWED:  # the top of the package puts the parts together
        return
    for imported, line in imports_of(path):
        if imported.split(".")[0] != PACKAGE or part_of(imported) == part:
            continue
        place = f"{path}:{line} imports {imported}"
        assert part_of(imported) in ALLOWED[part], f"{place}: {part} may import {sorted(ALLOWED[part])} only"
        inner = imported.split(".", 1)[1]
        assert not inner.startswith(FORBIDDEN_INSIDE.get(part, ())), f"{place}, which is not for {part}"


@pytest.mark.parametrize(
    "folder", [ROOT / PACKAGE, ROOT / "policies", ROOT / "kernels", ROOT / "scripts", ROOT / "tests"]
)
def test_policies_and_kernels_are_never_bare_names(folder):
    for path in folder.rglob("*.py"):
        bare = [line for name, line in imports_of(path) if name.split(".")[0] in ("policies", "kernels")]
        assert not bare, f"{path}:{bare[0]} imports a bare `policies` or `kernels`"


def test_the_core_does_not_import_colossalai():
    for name, path in SOURCES:
        if part_of(name) != "bridges":
            assert not [line for imported, line in imports_of(path) if imported.split(".")[0] == "colossalai"], path


def test_policies_and_kernels_start_with_a_docstring_and_nothing_else():
    for folder in ("policies", "kernels"):
        body = ast.parse((ROOT / folder / "__init__.py").read_text()).body
        assert [type(node) for node in body] == [ast.Expr]


def test_the_rules_are_about_what_exists():
    parts = {part_of(name) for name, _ in SOURCES}
    for part in set(ALLOWED) | set().union(*ALLOWED.values()):
        assert part in parts, part
    assert part_of(f"{PACKAGE}.config.shard.ShardConfig") == "config"
    assert part_of(f"{PACKAGE}.kernels.reference") == "kernels"
    assert part_of(f"{PACKAGE}.InferenceConfig") == "__init__"


def test_importing_the_package_imports_nothing_heavy():
    script = (
        "import sys, inference_shardformer\n"
        "from inference_shardformer import InferenceConfig, SamplingParams, ShardConfig\n"
        f"sys.exit(', '.join(set({HEAVY}) & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd="/")
    assert done.returncode == 0, done.stderr


def test_importing_the_wrapper_imports_no_transformers():
    script = (
        "import sys\n"
        "from inference_shardformer import InferenceEngine, InferenceShardformer\n"
        "sys.exit(', '.join({'transformers', 'triton'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd="/")
    assert done.returncode == 0, done.stderr
