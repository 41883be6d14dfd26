"""The workload file of `bench throughput`: requests of token ids, and how many may run at once."""

from __future__ import annotations

import json
from dataclasses import dataclass

from inference_shardformer.cli.prompts import ids_problem, is_count, read_text, unknown_keys
from inference_shardformer.cli.report import UsageError

_REMEDY = 'the file is {"max_running": N, "requests": [{"prompt": [ids], "max_new": N}, ...]}'


@dataclass(frozen=True)
class Workload:
    """Requests that arrive together. `max_new[i]` tokens are generated for `prompts[i]`."""

    max_running: int
    prompts: list[list[int]]
    max_new: list[int]

    def shifted(self) -> Workload:
        """The same lengths with other ids, none above the largest of this workload (for a warm-up)."""
        size = max(2, 1 + max(max(prompt) for prompt in self.prompts))
        return Workload(self.max_running, [[(i + 1) % size for i in prompt] for prompt in self.prompts], self.max_new)


def read_workload(name: str) -> Workload:
    """Read a workload. Raises one UsageError that names everything wrong with it."""
    text = read_text(name)
    try:
        content = json.loads(text)
    except ValueError as exc:
        raise UsageError(f"workload file {name}: is not JSON: {exc}", remedy=_REMEDY) from exc
    problems = _problems(content)
    if problems:
        raise UsageError("\n    ".join([f"workload file {name}: is malformed", *problems]), remedy=_REMEDY)
    requests = content["requests"]
    return Workload(content["max_running"], [entry["prompt"] for entry in requests], [e["max_new"] for e in requests])


def _problems(content: object) -> list[str]:
    """Everything wrong with the content of a workload file."""
    if not isinstance(content, dict):
        return [f"holds a {type(content).__name__}, not an object"]
    problems = [unknown] if (unknown := unknown_keys(list(content), ("max_running", "requests"))) else []
    if not is_count(content.get("max_running"), minimum=1):
        problems.append(f'"max_running" is {content.get("max_running")!r}, not an integer of at least 1')
    requests = content.get("requests")
    if not isinstance(requests, list) or not requests:
        return [*problems, '"requests" is not a list with at least one request']
    for place, entry in enumerate(requests):
        problems += [f"requests[{place}]: {problem}" for problem in _request_problems(entry)]
    return problems


def _request_problems(entry: object) -> list[str]:
    """Everything wrong with one request."""
    if not isinstance(entry, dict):
        return [f"is a {type(entry).__name__}, not an object"]
    problems = [unknown] if (unknown := unknown_keys(list(entry), ("prompt", "max_new"))) else []
    if "prompt" not in entry:
        problems.append('"prompt" is missing')
    elif problem := ids_problem(entry["prompt"]):
        problems.append(f'"prompt" {problem}')
    if not is_count(entry.get("max_new"), minimum=1):
        problems.append(f'"max_new" is {entry.get("max_new")!r}, not an integer of at least 1')
    return problems
