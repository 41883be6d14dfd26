"""Calls in a Python file whose meaning differs here, told so that the code is changed with its configuration."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from inference_shardformer.config.migrate.literals import Names, assignments
from inference_shardformer.config.migrate.sources import Entry

_ENGINES = frozenset({"InferenceEngine", "LLMEngine", "AsyncInferenceEngine", "RPCInferenceEngine"})

_POSITIONAL = (
    "the first positional argument was request_ids, so that generate(prompts) returned [] without an error (B11); here "
    "prompts come first"
)
_REPLACED = (
    "a GenerationConfig given to one call replaced the engine's for good (B12); here SamplingParams hold for the "
    "requests of that call alone"
)
_MAX_LENGTH = (
    "max_length, 20 unless given, won over max_new_tokens (B10); here max_new_tokens of SamplingParams is the only "
    "limit of a request, and it counts generated tokens alone"
)
_ENQUEUED = (
    "only the first prompt was checked before the others were queued (B9); here all prompts of a call are checked "
    "before any is queued"
)
_TEXTS = "the texts held prompt and completion; here output.text is the completion alone"
_TRUSTED = "model code that comes with a checkpoint was always run; here only with inference.weights.trust_remote_code"
_POLICY = "a policy is no configuration: pass one of ours as policy= of from_pretrained() or optimize()"
_SPECULATION = (
    "speculative decoding with a second model is not offered, and greedy tokens are the same without it; "
    "scheduler.speculation=prompt_lookup guesses without one"
)


def find_traps(tree: ast.Module, names: Names) -> list[Entry]:
    """Every such call, by line; empty for a file that makes no engine of ColossalAI's."""
    engines = {
        target: value for target, value in assignments(tree) if isinstance(value, ast.Call) and _is_engine(value, names)
    }
    found: list[Entry] = []
    takes_config = False
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        if _is_engine(node, names):
            found += _of_constructor(node)
        elif isinstance(node.func, ast.Attribute) and ast.unparse(node.func.value) in engines:
            found += _of_method(node, node.func.attr)
            takes_config |= any(keyword.arg == "generation_config" for keyword in node.keywords)
    if takes_config:
        found += _of_generation_configs(tree, names)
    return sorted(found, key=lambda entry: entry.line or 0)


def _is_engine(call: ast.Call, names: Names) -> bool:
    parts = names.dotted(call.func).split(".")
    return parts[-1] in _ENGINES and (len(parts) == 1 or parts[0] == "colossalai")


def _of_constructor(call: ast.Call) -> Iterator[Entry]:
    """An engine made from a path, or with a policy."""
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    model = call.args[0] if call.args else given.get("model_or_path")
    if isinstance(model, ast.Constant):
        yield _entry(call, "InferenceEngine", _TRUSTED)
    if "model_policy" in given:
        yield _entry(call, "model_policy", _POLICY)


def _of_method(call: ast.Call, method: str) -> Iterator[Entry]:
    """A call of an engine's method."""
    if method in ("generate", "add_request") and call.args:
        yield _entry(call, method, _POSITIONAL)
    if method == "generate":
        yield _entry(call, method, _TEXTS)
    if method == "add_request":
        yield _entry(call, method, _ENQUEUED)
    if method == "enable_spec_dec":
        yield _entry(call, method, _SPECULATION)
    if any(keyword.arg == "generation_config" for keyword in call.keywords):
        yield _entry(call, "generation_config", _REPLACED)


def _of_generation_configs(tree: ast.Module, names: Names) -> Iterator[Entry]:
    """GenerationConfig(...) with a limit on the length, in a file that hands one to an engine."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or names.dotted(node.func).split(".")[-1] != "GenerationConfig":
            continue
        if {"max_length", "max_new_tokens"} & {keyword.arg for keyword in node.keywords}:
            yield _entry(node, "GenerationConfig", _MAX_LENGTH)


def _entry(call: ast.Call, name: str, sentence: str) -> Entry:
    text = " ".join(ast.unparse(call).split())
    return Entry("changed", name, text if len(text) <= 80 else f"{text[:77]}...", call.lineno, sentence)
