"""The tables of docs/migrating-configuration.md, made from the fields; run as a module it renews them in the file."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

from inference_shardformer.config.migrate.fates import ForeignField
from inference_shardformer.config.migrate.inference_fields import INFERENCE_FIELDS
from inference_shardformer.config.migrate.shard_fields import RETIRED_SHARD_FIELDS, SHARD_FIELDS
from inference_shardformer.config.violations import show

TABLES = {
    "InferenceConfig": INFERENCE_FIELDS,
    "ShardConfig": SHARD_FIELDS,
    "ShardConfig, older versions": RETIRED_SHARD_FIELDS,
}


def with_tables(text: str) -> str:
    """The document with every table between its two marks made anew. Raises KeyError for a mark of no table."""
    parts = []
    for number, part in enumerate(text.split("<!-- table: ")):
        if not number:
            parts.append(part)
            continue
        name, _, rest = part.partition(" -->")
        _, end, rest = rest.partition("<!-- end -->")
        parts.append(f"{name} -->\n\n{markdown(TABLES[name])}\n{end}{rest}")
    return "<!-- table: ".join(parts)


def markdown(fields: Iterable[ForeignField]) -> str:
    """A table with one row for every field."""
    rows = ["| field | default | fate | becomes | why, and what to know |", "|---|---|---|---|---|"]
    for row in fields:
        cells = (f"`{row.name}`", f"`{show(row.default)}`", row.kind, row.becomes, row.sentence)
        rows.append(f"| {' | '.join(_escaped(cell) for cell in cells)} |")
    return "\n".join(rows) + "\n"


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|")


if __name__ == "__main__":
    for name in sys.argv[1:]:
        Path(name).write_text(with_tables(Path(name).read_text(encoding="utf-8")), encoding="utf-8")
