"""Backends are chosen when modules are built: steps select nothing, and no `forward` could."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_models import ragged_prompts, tiny_model
from windowed_models import WindowedLlamaPolicy, windowed_model

from inference_shardformer import InferenceConfig, InferenceShardformer, SamplingParams, ShardConfig
from inference_shardformer.attention import proof, selector, survey
from inference_shardformer.compute import bound, selection
from inference_shardformer.plugins import Registry
from inference_shardformer.probing import collect, probe

PACKAGE = Path(selector.__file__).parents[1]
HOT_FOLDERS = [PACKAGE / name for name in ("modeling", "layers", "attention", "compute", "../policies")]
HOT_FUNCTIONS = (
    "forward", "attend", "attend_with_sinks", "write", "of",
    "multiply", "multiply_wide", "multiply_gated", "rows", "rms_norm", "project", "run", "run_modules",
)  # fmt: skip
LOOKUPS = {
    "environ", "getenv", "is_available", "find_spec", "import_module", "get_device_capability", "select", "judge",
    "version", "cpu_count", "hasattr", "__import__",
}  # fmt: skip


def _hot_functions() -> Iterator[tuple[str, ast.FunctionDef]]:
    for folder in HOT_FOLDERS:
        for path in sorted(folder.glob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.FunctionDef) and node.name in HOT_FUNCTIONS:
                    yield f"{path.stem}.{node.name}:{node.lineno}", node


def _offences(function: ast.FunctionDef) -> list[str]:
    """Imports, look-ups, probes, and branches on names, in the source of one function."""
    found = []
    for node in ast.walk(function):
        if isinstance(node, ast.Import | ast.ImportFrom):
            found.append("an import")
        elif isinstance(node, ast.Attribute) and node.attr in LOOKUPS:
            found.append(node.attr)
        elif isinstance(node, ast.Name) and node.id in LOOKUPS:
            found.append(node.id)
        elif isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            found += [f"a comparison with {s.value!r}" for s in sides if _is_text(s)]
    return found


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def test_no_hot_function_could_select() -> None:
    functions = dict(_hot_functions())
    assert len(functions) > 10
    assert {name: _offences(function) for name, function in functions.items() if _offences(function)} == {}


@pytest.mark.parametrize(
    "body",
    [
        "import flash_attn",
        "return os.environ['X']",
        "return torch.cuda.is_available()",
        "return 1 if self.n == 'a' else 2",
    ],
)
def test_the_walk_finds_what_it_looks_for(body: str) -> None:
    function = ast.parse(f"def forward(self):\n    {body}").body[0]
    assert isinstance(function, ast.FunctionDef)
    assert _offences(function)


@pytest.mark.parametrize("policy", [None, WindowedLlamaPolicy()], ids=["alike", "windows"])
def test_steps_make_no_selector_call(monkeypatch: pytest.MonkeyPatch, policy: WindowedLlamaPolicy | None) -> None:
    native = tiny_model("gqa") if policy is None else windowed_model()
    with InferenceShardformer(ShardConfig(device="cpu"), InferenceConfig(dtype="fp32")) as shardformer:
        model, _ = shardformer.optimize(native, policy)
        engine = shardformer.attach(model)
        backends = [layer.self_attn.backend for layer in model.model.layers]
        assert len(set(backends)) == (1 if policy is None else 2)
        calls: list[str] = []

        def counting(name: str) -> object:
            return lambda *args, **kwargs: calls.append(name)

        for place, name in [
            (selector, "select"), (selector, "judge"), (selector, "build"), (survey, "make_survey"), (proof, "prove"),
            (probe, "probe"), (collect, "collect_facts"), (Registry, "get"), (Registry, "names"),
            (torch.cuda, "is_available"), (subprocess, "Popen"),
            (selection, "select_kernel"), (selection, "make_kernel_survey"), (bound, "build_kernels"),
        ]:  # fmt: skip
            monkeypatch.setattr(place, name, counting(name))
        engine.generate(ragged_prompts(6, 160), SamplingParams(max_new_tokens=20))
        assert calls == []
        assert all(layer.self_attn.backend is bound for layer, bound in zip(model.model.layers, backends, strict=True))
