"""Which shapes are tried: values inside and just outside of what a backend declares."""

from __future__ import annotations

from dataclasses import replace

import torch

from inference_shardformer.attention.base import AttentionCapabilities, Feature, Sizes
from inference_shardformer.conformance.cases import Case, Sequences, named_batches
from inference_shardformer.conformance.pairwise import pairwise

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8)
_SIZES = {
    "head_dim": (16, 64, 20, 8, 128, 80, 96, 256),
    "block_size": (16, 1, 5, 32, 64, 128, 256),
    "gqa_ratio": (3, 1, 2, 8, 4, 7, 16),
}
_MOST = {"head_dim": 4, "block_size": 4, "gqa_ratio": 5}


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` for `torch.float32`."""
    return str(dtype).removeprefix("torch.")


def inside(axis: str, declared: Sizes) -> list[int]:
    """Some sizes that are declared, the one that other checks use first. Every choice of a short list."""
    if declared.choices:
        return sorted(declared.choices, key=lambda size: (abs(size - _SIZES[axis][0]), size))
    common = [size for size in _SIZES[axis] if size in declared][: _MOST[axis]]
    ends = [declared.smallest] + ([declared.high] if declared.high and declared.high in declared else [])
    return list(dict.fromkeys(common + [size for size in ends if not common or size <= 2 * max(common)]))


def outside(declared: Sizes) -> list[int]:
    """Some sizes that are not declared, close to those that are."""
    close = {size + step for size in (*declared.choices, declared.smallest, declared.high or 0) for step in (-1, 1)}
    return sorted(size for size in close if size >= 1 and size not in declared)[:6]


def base_case(declared: AttentionCapabilities, sequences: Sequences = ()) -> Case:
    """The shape at which checks run that are not about shapes."""
    return Case(
        sequences,
        dtype=declared.dtypes[0],
        gqa_ratio=inside("gqa_ratio", declared.gqa_ratios)[0],
        head_dim=inside("head_dim", declared.head_dims)[0],
        block_size=inside("block_size", declared.block_sizes)[0],
    )


def batches(declared: AttentionCapabilities, block_size: int) -> dict[str, Sequences]:
    """The named batches that need no feature beyond what is declared."""
    table = named_batches(block_size)
    return {name: sequences for name, sequences in table.items() if Case(sequences).features <= declared.features}


def main_batch(declared: AttentionCapabilities) -> Sequences:
    """The richest batch that is declared."""
    table = batches(declared, 16)
    return table.get("mixed") or table["ragged_decodes"]


def main_case(declared: AttentionCapabilities) -> Case:
    """The richest batch at the base shape."""
    return base_case(declared, main_batch(declared))


def combinations(declared: AttentionCapabilities) -> dict[str, Case]:
    """Declared combinations in which any two values of any two facts meet, by a readable name."""
    features = declared.features
    axes: dict[str, list[object]] = {
        "batch": [name for name in batches(declared, 16) if not name.startswith("long")],
        "dtype": list(declared.dtypes),
        "head_dim": list(inside("head_dim", declared.head_dims)),
        "block_size": list(inside("block_size", declared.block_sizes)),
        "gqa_ratio": list(inside("gqa_ratio", declared.gqa_ratios)),
        "num_kv_heads": [2, 1],
        "window": [None, 5, 40] if Feature.SLIDING_WINDOW in features else [None],
        "softcap": [None, 1.5] if Feature.SOFTCAP in features else [None],
        "sinks": [False, True] if Feature.SINKS in features else [False],
    }
    return dict(_named_case(row) for row in pairwise(axes))


def _named_case(row: dict[str, object]) -> tuple[str, Case]:
    batch, block_size, window, softcap = row.pop("batch"), row["block_size"], row["window"], row["softcap"]
    parts = [
        str(batch),
        dtype_name(row["dtype"]),  # type: ignore[arg-type]
        f"kv{row['num_kv_heads']}x{row['gqa_ratio']}",
        f"dim{row['head_dim']}",
        f"block{block_size}",
        f"window{window}" if window else "",
        f"softcap{softcap}" if softcap else "",
        "sinks" if row["sinks"] else "",
    ]
    case = replace(Case(named_batches(int(str(block_size)))[str(batch)]), **row)  # type: ignore[arg-type]
    return "-".join(filter(None, parts)), case
