"""What can be read from a decoder's native attention: its projections, its norms, its scale and its windows."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Literal

from torch import nn

from inference_shardformer.drafting.rows import DraftRow
from inference_shardformer.drafting.tree import Kind
from inference_shardformer.errors import InferenceShardformerError
from inference_shardformer.policies.windows import (
    SlidingWindows,
    no_windows,
    same_window_everywhere,
    windows_by_pattern,
    windows_of_last_layers,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Packing = Literal["", "by head", "by kind"]
_INTERFACE = "ALL_ATTENTION_FUNCTIONS"
_SCALE_WORDS = ("scalar", "multiplier", "attn_scale", "attention_scale", "scaling")
_QUERY = ("q_proj", "query", "wq", "q")
_KEY_VALUE = ("k_proj", "v_proj", "key", "value", "wk", "wv", "k", "v")
_OUTPUT = ("o_proj", "dense", "out_proj", "wo", "c_proj", "o")
_PACKED = ("query_key_value", "qkv_proj", "c_attn", "qkv", "Wqkv", "in_proj", "W_pack")
_WINDOW_FUNCTIONS: dict[str, Callable[[PreTrainedConfig], SlidingWindows]] = {
    "no_windows(hf_config)": no_windows,
    "same_window_everywhere(hf_config)": same_window_everywhere,
    "windows_of_last_layers(hf_config)": windows_of_last_layers,
    "windows_by_pattern(hf_config, every=1)": lambda config: windows_by_pattern(config, every=1),
}


class Heads:
    """The head counts of a configuration."""

    def __init__(self, hf_config: PreTrainedConfig) -> None:
        self.queries = int(hf_config.num_attention_heads)
        self.key_values = int(getattr(hf_config, "num_key_value_heads", None) or self.queries)
        self.dim = int(getattr(hf_config, "head_dim", None) or hf_config.hidden_size // self.queries)


def is_attention(kind: Kind) -> bool:
    """Whether a kind is attention that stands for a layer."""
    return "attention" in type(kind.first).__name__.lower() and any(
        isinstance(child, nn.Linear) or hasattr(child, "nf") for child in kind.first.children()
    )


def attention_row(kind: Kind, heads: Heads) -> DraftRow | str:
    """The row that keeps native attention over the paged cache, or why that is not possible."""
    native = kind.first
    if _INTERFACE not in inspect.getsource(type(native).forward):
        return f"{kind.pattern}: {type(native).__name__} does not call Hugging Face's attention interface"
    if not isinstance(getattr(native, "layer_idx", None), int):
        return f"{kind.pattern}: {type(native).__name__} does not know the number of its layer"
    counts, kv_counts = _head_counts(native, heads)
    arguments = [("native_class", f'"{type(native).__name__}"')]
    arguments += [("head_counts", _tuple(counts))] if counts else []
    arguments += [("kv_head_counts", _tuple(kv_counts))] if kv_counts else []
    reason = "calls Hugging Face's attention interface"
    return DraftRow("native_attention", kind.pattern, "likely", reason, tuple(arguments))


def layer_row(layer: Kind, attention: Kind) -> DraftRow | None:
    """The row of layers that do not hand their keyword arguments on to attention; `None` for those that do."""
    if inspect.getsource(type(layer.first).forward).count("**kwargs") > 1:
        return None
    arguments = (("native_class", f'"{type(layer.first).__name__}"'), ("attention", f'"{attention.leaf}"'))
    reason = "does not hand its keyword arguments on to attention"
    return DraftRow("native_layer", layer.pattern, "likely", reason, arguments)


def projection_row(kind: Kind, heads: Heads, plan: Mapping[str, str], packing: Packing) -> DraftRow | str:
    """The row of a projection or norm inside attention, or what cannot be told of it.

    How a packed projection is packed is not in its shapes; `packing` is a guess, which verification must confirm.
    """
    shapes, name = kind.shapes, kind.leaf
    weight = shapes.get("weight")
    if weight is None or not set(shapes) <= {"weight", "bias"}:
        return f"{kind.pattern} holds {sorted(shapes)}, which is not a projection or a norm"
    if isinstance(kind.first, nn.Linear):
        if name in _PACKED:
            return _packed_row(kind, weight, heads, packing)
        return _linear_row(kind, name, weight, heads, plan.get(kind.pattern, ""))
    return _norm_row(kind, weight, heads)


def windows_source(hf_config: PreTrainedConfig, attention: Kind) -> str | None:
    """The expression for the windows of the layers that agrees with what native modules hold; `None` if none does."""
    known = all(hasattr(module, "sliding_window") for module in attention.modules)
    held = tuple(
        (getattr(module, "sliding_window", None) or None) if getattr(module, "is_sliding", True) else None
        for module in attention.modules
    )
    wanted = held if any(held) else ()
    for source, function in _WINDOW_FUNCTIONS.items():
        try:
            windows = function(hf_config)
        except (InferenceShardformerError, AttributeError):
            continue
        if not known or windows == wanted:
            return source
    return None


def scale_source(hf_config: PreTrainedConfig, attention: Kind, heads: Heads) -> str | None:
    """The expression for the scale of the scores; empty for the usual one, `None` if it cannot be told."""
    scales = {float(module.scaling) for module in attention.modules if hasattr(module, "scaling")}  # type: ignore[arg-type]
    if len(scales) > 1:
        return None
    for name, value in sorted(hf_config.to_dict().items()):
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0
        if scales and is_number and any(word in name for word in _SCALE_WORDS):
            (scale,) = scales
            for source, found in ((f"float(hf_config.{name})", value), (f"hf_config.{name} ** -0.5", value**-0.5)):
                if math.isclose(found, scale, rel_tol=1e-9):
                    return source
    is_usual = all(math.isclose(scale, heads.dim**-0.5, rel_tol=1e-9) for scale in scales)
    return "" if is_usual else None


def _linear_row(kind: Kind, name: str, weight: tuple[int, ...], heads: Heads, style: str) -> DraftRow | str:
    rows, columns = weight
    planned = f", and {style!r} in Hugging Face's plan" if style else ""
    if name in _QUERY and rows == heads.queries * heads.dim:
        sure = "certain" if style.startswith("colwise") else "likely"
        return DraftRow("heads", kind.pattern, sure, f"{heads.queries} heads of {heads.dim}{planned}")  # type: ignore[arg-type]
    if name in _KEY_VALUE and rows == heads.key_values * heads.dim:
        sure = "certain" if style.startswith("colwise") else "likely"
        return DraftRow("kv_heads", kind.pattern, sure, f"{heads.key_values} heads of {heads.dim}{planned}")  # type: ignore[arg-type]
    if name in _OUTPUT and columns == heads.queries * heads.dim:
        sure = "certain" if style.startswith("rowwise") else "likely"
        return DraftRow("row", kind.pattern, sure, f"takes in {heads.queries} heads of {heads.dim}{planned}")  # type: ignore[arg-type]
    return f"{kind.pattern} is a projection {columns} -> {rows} of unknown meaning"


def _packed_row(kind: Kind, weight: tuple[int, ...], heads: Heads, packing: Packing) -> DraftRow | str:
    if packing == "by head" and heads.queries == heads.key_values and weight[0] == 3 * heads.queries * heads.dim:
        return DraftRow("heads", kind.pattern, "guess", "query, key and value of one head together, then the next head")
    if packing == "by kind" and weight[0] == (heads.queries + 2 * heads.key_values) * heads.dim:
        return DraftRow("native_packed_qkv", kind.pattern, "guess", "all queries, then all keys, then all values")
    return f"{kind.pattern} packs query, key and value; their order cannot be told from the shapes"


def _norm_row(kind: Kind, weight: tuple[int, ...], heads: Heads) -> DraftRow | str:
    counts = {heads.queries: "False", heads.key_values: "True"}
    is_kv = kind.leaf.startswith("k")
    count = heads.key_values if is_kv else heads.queries
    if weight == (heads.dim,):
        return DraftRow("replicate", kind.pattern, "certain", "one weight for every head")
    if len(weight) == 2 and weight[0] == count and count in counts:
        return DraftRow(
            "head_norm", kind.pattern, "likely", f"a weight for each of {count} heads", (("is_kv", str(is_kv)),)
        )
    if weight == (count * heads.dim,) and "RMSNorm" in type(kind.first).__name__:
        arguments = (("native_class", f'"{type(kind.first).__name__}"'), ("is_kv", str(is_kv)))
        return DraftRow("width_norm", kind.pattern, "likely", "one norm over all heads together", arguments)
    return f"{kind.pattern}: a {type(kind.first).__name__} with weight {list(weight)} inside attention is not known"


def _head_counts(native: nn.Module, heads: Heads) -> tuple[list[str], list[str]]:
    """Names of attributes that count heads of queries, and of keys and values."""
    counts, kv_counts = [], []
    for name, value in vars(native).items():
        if not isinstance(value, int) or isinstance(value, bool) or "head" not in name:
            continue
        is_kv = "kv" in name or "key_value" in name
        if "dim" in name or "group" in name:
            continue
        if is_kv and value == heads.key_values:
            kv_counts.append(name)
        elif not is_kv and value == heads.queries:
            counts.append(name)
    return counts, kv_counts


def _tuple(names: list[str]) -> str:
    inner = ", ".join(f'"{name}"' for name in names)
    return f"({inner},)" if len(names) == 1 else f"({inner})"
