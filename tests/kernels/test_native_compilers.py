"""The native sources are sound to other compilers than the one that builds them here, without a warning."""

from __future__ import annotations

import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from inference_shardformer.kernels.cpu import build

COMPILERS = {"clang++": ("avx2", "amx"), "aarch64-linux-gnu-g++": ()}  # and levels, beside the portable one


@pytest.mark.parametrize("compiler", COMPILERS)
def test_another_compiler_warns_of_nothing(compiler: str, tmp_path: Path) -> None:
    command = [compiler]
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler}")
    known = build._LEVELS["x86_64"]
    levels = {level: known[level] for level in COMPILERS[compiler] if build._accepts(command, known[level])}
    looks = [[*unit.command, "-fsyntax-only", "-Werror"] for unit in build._units(command, levels, tmp_path)]
    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(lambda look: subprocess.run(look, capture_output=True, text=True, check=False), looks))
    assert len(done) > 10
    assert [each.stderr[:2000] for each in done if each.returncode != 0] == []
