"""docs/backends.md says what the declarations say, and knows every reason."""

from __future__ import annotations

import json
import re

from selection_profiles import GOLDEN
from support_matrix import DOCUMENT, matrix, with_matrix

TEXT = DOCUMENT.read_text(encoding="utf-8")


def test_the_matrix_is_current():
    assert with_matrix(TEXT) == TEXT, "python tests/support/support_matrix.py"
    assert "| `sdpa` | `cpu` | `flash_attn` | " in matrix()


def test_every_code_of_the_golden_files_is_explained():
    verdicts = [line for path in GOLDEN.iterdir() for line in json.loads(path.read_text())["verdicts"]]
    codes = {code for line in verdicts for code in line.partition(": ")[2].split() if code != "serves"}
    known = set(re.findall(r"`([a-z_]+)`", TEXT.partition("## Reasons")[2].partition("## Declaring")[0]))
    assert {"missing", "abi_mismatch", "device"} <= codes
    assert {code for code in codes if not code.startswith("feature_")} <= known


def test_the_example_of_a_declaration_runs():
    example = re.search(r"```python\n(.*?)```", TEXT, re.DOTALL)[1]
    namespace: dict[str, type] = {}
    exec(compile(example, str(DOCUMENT), "exec"), namespace)
    (requirement,) = namespace["FlashAttention"].requires
    assert requirement.platforms == ("cuda",)
