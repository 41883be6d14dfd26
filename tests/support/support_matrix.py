"""The table of what each built-in attention backend serves, made from its declaration.

`python tests/support/support_matrix.py` writes it into docs/backends.md.
"""

from __future__ import annotations

from pathlib import Path

from inference_shardformer.attention.base import AttentionBackend, Feature
from inference_shardformer.attention.survey import make_registry

DOCUMENT = Path(__file__).parents[2] / "docs" / "backends.md"
BEGIN, END = "<!-- matrix: python tests/support/support_matrix.py -->", "<!-- end of matrix -->"


def matrix() -> str:
    """The table in Markdown: one column for each backend, one row for each fact."""
    registry = make_registry()
    ours = [name for name in registry.names() if registry.origin(name).startswith("inference_shardformer.")]
    backends = [registry.get(name) for name in ours]
    rows = [["", *(f"`{name}`" for name in ours)], ["---"] * (len(ours) + 1)]
    facts = [_facts(backend) for backend in backends]
    rows += [[label, *(fact[label] for fact in facts)] for label in facts[0]]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _facts(backend: type[AttentionBackend]) -> dict[str, str]:
    declared = backend.capabilities
    dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in declared.dtypes)
    kv_dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in declared.kv_dtypes)
    features = {f"`{feature.value}`": "yes" if feature in declared.features else "no" for feature in Feature}
    return {
        "device types of torch": ", ".join(declared.devices),
        "queries": dtypes,
        "keys and values": f"as queries, {kv_dtypes}" if kv_dtypes else "as queries",
        "head_dim": str(declared.head_dims),
        "block_size": str(declared.block_sizes),
        "query heads per key head": str(declared.gqa_ratios),
        **features,
        "layout of the cache": f"`{declared.kv_layout.value}`",
        "foreign libraries": ", ".join(f"`{each.module}`" for each in backend.requires) or "none",
        "native CPU kernels": "needed" if declared.needs_native else "not needed",
        "contract": str(backend.contract_version),
    }


def with_matrix(text: str) -> str:
    """The document with a fresh table."""
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    return f"{before}{BEGIN}\n\n{matrix()}\n\n{END}{after}"


if __name__ == "__main__":
    DOCUMENT.write_text(with_matrix(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
