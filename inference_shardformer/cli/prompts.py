"""Prompts of the command line: `--prompt` texts, then the lines of a `--prompts-file`."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from inference_shardformer.cli.report import UsageError

_KEYS = ("prompt", "prompt_token_ids", "max_new_tokens")
_SHOWN_LINES = 100


@dataclass(frozen=True)
class Prompt:
    """One prompt: text or token ids, and its own limit of new tokens where it has one."""

    content: str | list[int]
    max_new_tokens: int | None = None


def collect_prompts(texts: Sequence[str], file: str | None) -> list[Prompt]:
    """All prompts in order. Raises UsageError when there is none, or when any line of the file is malformed."""
    if not texts and file is None:
        raise UsageError(
            "no prompt given: at least one is needed",
            remedy="give --prompt TEXT (repeatable) or --prompts-file FILE.jsonl",
        )
    for text in texts:
        problem = _text_problem(text)
        if problem and (text or (len(texts) == 1 and file is None)):  # beside others, an empty one is refused alone
            raise UsageError(
                f"--prompt {text!r}: {problem}", remedy="give a prompt of at least one character, in UTF-8"
            )
    return [Prompt(text) for text in texts] + (read_prompts_file(file) if file is not None else [])


def read_prompts_file(name: str) -> list[Prompt]:
    """Prompts of a JSON-lines file; blank lines are skipped. Raises one UsageError naming every malformed line."""
    lines = [(number, line) for number, line in enumerate(read_text(name).split("\n"), start=1) if line.strip()]
    prompts: list[Prompt] = []
    problems: list[str] = []
    for number, line in lines:
        parsed = _parse_line(line)
        if isinstance(parsed, Prompt):
            prompts.append(parsed)
        else:
            problems.append(f"line {number}: {parsed}")
    remedy = 'each line is {"prompt": "..."} or {"prompt_token_ids": [...]}, with an optional "max_new_tokens"'
    if problems:
        more = [f"and {len(problems) - _SHOWN_LINES} more"] if len(problems) > _SHOWN_LINES else []
        head = f"prompts file {name}: {len(problems)} of {len(lines)} lines are malformed, so nothing was run"
        raise UsageError("\n    ".join([head, *problems[:_SHOWN_LINES], *more]), remedy=remedy)
    if not prompts:
        raise UsageError(f"prompts file {name}: holds no prompt", remedy=remedy)
    return prompts


def read_text(name: str) -> str:
    """A file that the command line names, as text; UsageError if it cannot be read."""
    try:
        return Path(name).read_text(encoding="utf-8")
    except OSError as exc:
        raise UsageError(f"{name}: cannot be read ({exc.strerror})", remedy="check the path") from exc
    except UnicodeDecodeError as exc:
        raise UsageError(f"{name}: is not UTF-8 text: {exc.reason}", remedy="save it as UTF-8") from exc


def is_count(value: object, *, minimum: int) -> bool:
    """Whether a JSON value is an integer of at least `minimum`; true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= minimum


def unknown_keys(given: Sequence[str], known: Sequence[str]) -> str:
    """A sentence about the keys that are not known, each with the nearest known one; empty if all are."""
    parts = []
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            parts.append(f"unknown key {key!r}" + (f", did you mean {near[0]!r}?" if near else ""))
    return "; ".join(parts)


def _parse_line(line: str) -> Prompt | str:
    """The prompt of one line, or what is wrong with it."""
    try:
        entry = json.loads(line)
    except ValueError as exc:
        return f"is not JSON: {exc}"
    if not isinstance(entry, dict):
        return f"is a {type(entry).__name__}, not an object"
    if unknown := unknown_keys(list(entry), _KEYS):
        return unknown
    if ("prompt" in entry) == ("prompt_token_ids" in entry):
        return 'needs exactly one of "prompt" and "prompt_token_ids"'
    if "max_new_tokens" in entry and not is_count(entry["max_new_tokens"], minimum=1):
        return f'"max_new_tokens" is {entry["max_new_tokens"]!r}, not an integer of at least 1'
    if "prompt" in entry:
        problem = _text_problem(entry["prompt"])
        return f'"prompt" {problem}' if problem else Prompt(entry["prompt"], entry.get("max_new_tokens"))
    problem = ids_problem(entry["prompt_token_ids"])
    return (
        f'"prompt_token_ids" {problem}' if problem else Prompt(entry["prompt_token_ids"], entry.get("max_new_tokens"))
    )


def ids_problem(ids: object) -> str:
    """What is wrong with a list of token ids; empty if nothing is."""
    if not isinstance(ids, list):
        return f"is a {type(ids).__name__}, not a list of token ids"
    if not ids:
        return "is empty"
    wrong = [(place, value) for place, value in enumerate(ids) if not is_count(value, minimum=0)]
    return f"holds {wrong[0][1]!r} at place {wrong[0][0]}; a token id is an integer of at least 0" if wrong else ""


def _text_problem(text: object) -> str:
    """What is wrong with a text prompt; empty if nothing is."""
    if not isinstance(text, str):
        return f"is a {type(text).__name__}, not text"
    if not text:
        return "is empty"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as exc:
        return f"is not valid Unicode at place {exc.start}"
    return ""
