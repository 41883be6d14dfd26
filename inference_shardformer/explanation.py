"""The text of `explain`: what was decided and why."""

from __future__ import annotations

from inference_shardformer.preparation import Prepared
from inference_shardformer.sharded import Sharded


def explain(prepared: Prepared, sharded: Sharded, cache_reason: str) -> str:
    """Every value with its source and reason, the shards of this rank, and every backend candidate with its verdict."""
    facts, config = prepared.facts, prepared.config
    held = sharded.plan.num_bytes(config.torch_dtype.itemsize)
    lines = [
        f"{facts.architecture}: {facts.num_layers} layers, {facts.total_num_heads} heads, "
        f"{facts.total_num_kv_heads} key/value heads, head_dim {facts.head_dim}, vocabulary {facts.vocab_size}",
        f"tp_size {config.tp_size} on {config.device}: rank {sharded.plan.layout.tp_rank} holds {held / 1e6:.1f} MB of "
        f"weights and read {sharded.bytes_read / 1e6:.1f} MB from files",
    ]
    if cache_reason:
        lines.append(f"cache: {cache_reason}")
    lines += ["", "values", *_table([(d.path, d.value, d.origin, d.reason) for d in config.decisions])]
    lines += ["", "attention backends", prepared.selection.explain()]
    return "\n".join(lines)


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
