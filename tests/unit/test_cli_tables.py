"""Tables of the command line keep words and numbers whole, however narrow the terminal is."""

from __future__ import annotations

import io

import pytest
from rich.text import Text

from inference_shardformer.cli.tables import empty_table, print_table

HEADER = ("parameter", "bytes", "note")
ROWS = (
    ("a group", "", ""),
    ("model.layers.0-5.self_attn.qkv_proj.weight", "6 x 1075200", "whole on every rank"),
    ("model.norm.weight", "512", "is model.embed_tokens.weight"),
)


def drawn(width: int, *, wrapped: str = "note") -> list[str]:
    table = empty_table(HEADER, ROWS, wrapped=wrapped, right=("bytes",))
    for row in ROWS:
        table.add_row(*map(Text, row))
    out = io.StringIO()
    print_table(table, out, width=width)
    return out.getvalue().splitlines()


@pytest.mark.parametrize("width", [20, 60, 80, 120])
def test_nothing_is_cut_in_pieces(width):
    text = "\n".join(drawn(width))
    for row in ROWS:
        for word in (row[0], row[1], *row[2].split()):
            assert word in text
    assert max(map(len, drawn(width))) <= max(width, 42 + 2 + 11 + 2 + 28)


def test_a_wide_terminal_shows_a_row_in_a_line():
    assert any(all(cell in line for cell in ROWS[1]) for line in drawn(120))


def test_without_a_column_that_wraps_the_table_is_as_wide_as_its_cells():
    assert any(all(cell in line for cell in ROWS[2]) for line in drawn(20, wrapped=""))


def test_numbers_end_where_their_header_does():
    header, _, _, large, small = drawn(120)[:5]
    ends = {header.index("bytes") + 5, large.index("1075200") + 7, small.index("512") + 3}
    assert len(ends) == 1
