"""The native library in a wheel built from the source distribution: there, or the reason why it is not."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("cxx", [None, "false"], ids=["with a compiler", "without"])
def test_a_wheel_built_from_the_source_distribution(native_library, tmp_path, cxx):
    """It holds the library, or the reason why there is none; and the sources, so that it can be built later."""
    tree = tmp_path / "tree"
    ignored = shutil.ignore_patterns("*.so", "*.o", "build", "__pycache__", "*.egg-info", "demo_model", "_native.json")
    for folder in ("kernels", "policies", "inference_shardformer"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tree / name)
    for name in [path for path in (tree / "kernels/cpu/src").glob("*_kernels.cpp") if "shm" not in path.name]:
        name.unlink()  # what takes long to compile, and all that needs it
    for name in ("elementwise", "linear", "attention"):
        for path in (tree / "kernels/cpu/src").glob(f"{name}*.cpp"):
            path.unlink()
    build_all = "import setuptools.build_meta as b; b.build_sdist('dist'); b.build_wheel('dist')"
    environment = {**os.environ, **({"CXX": cxx} if cxx else {})}
    (tree / "dist").mkdir()
    subprocess.run([sys.executable, "-c", build_all], cwd=tree, env=environment, check=True, capture_output=True)
    (wheel,) = (tree / "dist").glob("*.whl")
    assert "-py3-none-linux_" in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    folder = "inference_shardformer/kernels/cpu/"
    assert (f"{folder}_native.so" in names) == (cxx is None)
    assert {f"{folder}{name}" for name in ("_native.json", "build.py", "src/shm.cpp", "src/team.h")} <= set(names)
    assert not [name for name in names if name.endswith(".o")]
    record = json.loads(zipfile.ZipFile(wheel).read(f"{folder}_native.json"))
    assert bool(record["error"]) == (cxx is not None)
    (sdist,) = (tree / "dist").glob("*.tar.gz")
    listed = subprocess.run(["tar", "tzf", sdist], capture_output=True, text=True, check=True).stdout
    assert "kernels/cpu/src/team.h" in listed
    assert "kernels/cpu/build.py" in listed
