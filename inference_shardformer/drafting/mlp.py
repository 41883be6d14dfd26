"""Rows of what stands beside attention: projections that can be cut, and modules that every rank keeps whole."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import nn

from inference_shardformer.drafting.rows import DraftRow
from inference_shardformer.drafting.tree import Kind

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_FIRST = ("gate_proj", "up_proj", "fc1", "c_fc", "w1", "w3", "dense_h_to_4h", "fc_in", "wi", "gate", "up")
_SECOND = ("down_proj", "fc2", "c_proj", "w2", "dense_4h_to_h", "fc_out", "wo", "down")
_PACKED = ("gate_up_proj", "gate_and_up", "w13", "wi_fused")


def mlp_row(kind: Kind, hf_config: PreTrainedConfig, plan: Mapping[str, str]) -> DraftRow | str:
    """The row of a module outside attention. What is whole on every rank is right wherever tokens do not mix."""
    if any(len(shape) == 0 for shape in kind.shapes.values()):
        return f"{kind.pattern} holds a parameter without an axis, which no row plans"
    if isinstance(kind.first, nn.Linear) and not _is_in_experts(kind):
        found = _linear_row(kind, int(hf_config.hidden_size), plan.get(kind.pattern, ""))
        if found is not None:
            return found
    if all(len(shape) == 1 for shape in kind.shapes.values()):
        return DraftRow("replicate", kind.pattern, "certain", f"a {type(kind.first).__name__} without a matrix")
    reason = f"a {type(kind.first).__name__} of unknown meaning, kept whole: right, but it costs memory on every rank"
    return DraftRow("replicate", kind.pattern, "guess", reason)


def _is_in_experts(kind: Kind) -> bool:
    return "expert" in kind.pattern


def _linear_row(kind: Kind, hidden_size: int, style: str) -> DraftRow | None:
    rows, columns = kind.shapes["weight"]
    name = kind.leaf
    if name in _PACKED and columns == hidden_size:
        reason = f"two projections {columns} -> {rows // 2} in one, taken for first and second half"
        return DraftRow("packed_column", kind.pattern, "likely" if style else "guess", reason)
    planned = f", {style!r} in Hugging Face's plan" if style else ""
    if columns == hidden_size and (style == "colwise" or (not style and name in _FIRST)):
        sure = "certain" if style else "likely"
        return DraftRow("column", kind.pattern, sure, f"{columns} -> {rows}{planned}")  # type: ignore[arg-type]
    if rows == hidden_size and (style.startswith("rowwise") or (not style and name in _SECOND)):
        sure = "certain" if style == "rowwise" else "likely"
        return DraftRow("row", kind.pattern, sure, f"{columns} -> {rows}{planned}")  # type: ignore[arg-type]
    return None
