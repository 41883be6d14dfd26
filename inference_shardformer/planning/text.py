"""A plan as text: one fact a line, then its tables."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

from inference_shardformer.explaining.text import aligned
from inference_shardformer.planning.rows import as_ranges, compressed
from inference_shardformer.planning.traffic import Traffic

if TYPE_CHECKING:
    from inference_shardformer.planning.report import PlanReport

K = TypeVar("K")

PARAMETERS = ("parameter", "cut", "on a rank", "bytes", "note")
EXCHANGES = ("module", "collective", "type", "for each", "bytes")
_MARGIN = " " * 11

Table = tuple[tuple[str, ...], list[tuple[str, ...]]]


def report_text(report: PlanReport, width: int, *, is_complete: bool) -> str:
    """The whole report within `width` columns."""
    parts = headline(report, width)
    for header, rows in tables(report, is_complete=is_complete):
        parts += ["", *aligned(header, rows, width)]
    return "\n".join(parts)


def tables(report: PlanReport, *, is_complete: bool) -> list[Table]:
    """The parameters and the collectives, those of layers that are alike in one row unless it `is_complete`."""
    found: list[Table] = [(PARAMETERS, parameter_cells(report, is_complete=is_complete))]
    if report.traffic.exchanges:
        found.append((EXCHANGES, exchange_cells(report.traffic, is_complete=is_complete)))
    return found


def headline(report: PlanReport, width: int) -> list[str]:
    """The facts, each with its name, wrapped at `width`."""
    return [line for text in _facts(report) for line in textwrap.wrap(text, width, subsequent_indent=_MARGIN)]


def _facts(report: PlanReport) -> list[str]:
    facts, kv, memory, work = report.facts, report.kv_cache, report.capacity, report.workspace
    held = ", ".join(f"rank {rank}: {amount(size)}" for rank, size in enumerate(report.rank_bytes))
    lines = [
        f"model      {facts.architecture} by {report.policy}: {facts.num_layers} layers, hidden {facts.hidden_size}, "
        f"{facts.total_num_heads} heads, {facts.total_num_kv_heads} key/value heads, head_dim {facts.head_dim}, "
        f"vocabulary {facts.vocab_size}, context {facts.max_position_embeddings}",
        f"plan       tp_size {report.tp_size} in {report.dtype} on {report.device}; "
        f"possible are {as_ranges(report.legal_tp_sizes)}",
        *(_MARGIN + line for line in _refusals(report.tp_sizes)),
        f"weights    {held}",
        f"{_MARGIN}compression {report.compression.value}: {report.compression.reason}",
        f"kv cache   {kv.bytes_per_token} bytes a token, {kv.bytes_per_block} bytes a block of {kv.block_size} tokens, "
        f"on each rank ({kv.num_kv_heads} key/value heads)",
        f"workspace  at most about {amount(work.num_bytes)} on each rank, for steps of {work.num_tokens} tokens and "
        f"{work.num_sequences} sequences",
        f"memory     {amount(memory.memory.num_bytes)} for each rank ({memory.memory.reason})",
    ]
    return [*lines, *_fits(report), *_sent(report.traffic)]


def parameter_cells(report: PlanReport, *, is_complete: bool) -> list[tuple[str, ...]]:
    """The parameters as cells under `PARAMETERS`."""
    rows = _listed([(row.name, row._replace(name="")) for row in report.rows], is_complete)
    return [
        (name, row.style, _alike(map(_shape, row.shapes)), _times(count, _alike(map(str, row.num_bytes))), row.note)
        for name, row, count in rows
    ]


def exchange_cells(traffic: Traffic, *, is_complete: bool) -> list[tuple[str, ...]]:
    """The collectives as cells under `EXCHANGES`."""
    named = [(each.module, each._replace(module="")) for each in traffic.exchanges]
    return [
        (name, each.collective, each.dtype, each.unit, _times(count, str(each.num_bytes)))
        for name, each, count in _listed(named, is_complete)
    ]


def amount(num_bytes: int) -> str:
    """Bytes in the largest unit that leaves a whole number."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(num_bytes) >= size:
            return f"{num_bytes / size:.2f} {unit}"
    return f"{num_bytes} bytes"


def _refusals(tp_sizes: Mapping[int, str | None]) -> list[str]:
    """Why the other sizes are impossible, those with the same reason in one line."""
    reasons: dict[str, list[int]] = {}
    for size, problem in tp_sizes.items():
        if problem is not None:
            reasons.setdefault(re.sub(rf"\b{size}\b", "it", problem), []).append(size)
    return [f"not {as_ranges(sizes)}: {reason}" for reason, sizes in reasons.items()]


def _fits(report: PlanReport) -> list[str]:
    """What the memory holds beside weights and workspace."""
    capacity = report.capacity
    if not capacity.num_blocks:
        missing = report.kv_cache.bytes_per_block - capacity.cache_bytes
        return [f"{_MARGIN}not enough: {amount(missing)} are missing for weights, workspace and one block"]
    counts = ", ".join(f"{count} of {length}" for length, count in capacity.num_sequences.items())
    return [
        f"{_MARGIN}{amount(capacity.cache_bytes)} for the cache: {capacity.num_blocks} blocks, {capacity.num_tokens} "
        f"tokens, at most {capacity.max_context} in one sequence",
        f"{_MARGIN}sequences together: {counts} tokens",
    ]


def _sent(traffic: Traffic) -> list[str]:
    """What a rank brings to collectives in all."""
    if not traffic.exchanges:
        return []
    lines = [
        f"exchanged  {traffic.num_bytes('token')} bytes a token, {traffic.num_bytes('sequence')} a sequence "
        f"({traffic.num_bytes('drawn sequence')} if it is drawn), {traffic.num_bytes('step')} a step, by each rank; "
        f"a step that decodes one sequence: {traffic.step_bytes(1, 1)} bytes"
    ]
    if traffic.undeclared:
        lines.append(f"{_MARGIN}and what these exchange, of which no plan is made: {', '.join(traffic.undeclared)}")
    return lines


def _listed(named: Sequence[tuple[str, K]], is_complete: bool) -> list[tuple[str, K, int]]:
    return [(name, key, 1) for name, key in named] if is_complete else compressed(named)


def _alike(texts: Iterable[str]) -> str:
    """What all ranks share, else each rank's own."""
    return " | ".join(dict.fromkeys(texts))


def _times(count: int, text: str) -> str:
    return f"{count} x {text}" if count > 1 and text else text


def _shape(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))
