"""docs/write-a-policy.md: its files are the example's, and everything on the page runs with the example installed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "docs" / "examples" / "granite_policy"
PAGE = (ROOT / "docs" / "write-a-policy.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
SNIPPETS = [text for language, title, text in BLOCKS if language == "python" and not title]
COMMANDS = [line for language, _, text in BLOCKS if language == "bash" for line in text.splitlines()]
INSTALL = "pip install docs/examples/granite_policy"

# One process, as importing torch takes longest. Every part prints its name when it has passed.
DRIVER = """
import json, runpy, shlex, sys

import pytest

from inference_shardformer.cli.main import main

def script(given):
    sys.argv = given
    runpy.run_path(given[0], run_name="__main__")

page = json.loads(sys.stdin.read())
run = {"pytest": lambda given: pytest.main([*given, "-q", "-p", "no:cacheprovider"]),
       "inference-shardformer": main, "python": script}
for command in page["commands"]:
    program, *arguments = shlex.split(command)
    try:
        code = run[program](arguments)
    except SystemExit as exc:
        code = exc.code
    assert not code, f"{command} ended with {code}"
    print("passed:", command, flush=True)
names = {}
for snippet in page["snippets"]:
    exec(compile(snippet, "write-a-policy.md", "exec"), names)
print("passed: snippets", flush=True)
"""


def test_every_file_of_the_example_is_on_the_page() -> None:
    shown = {title: text for _, title, text in BLOCKS if title}
    files = {path.name: path.read_text(encoding="utf-8") for path in EXAMPLE.iterdir() if path.is_file()}
    assert shown == files


def test_what_the_page_links_to_exists() -> None:
    for target in re.findall(r"\]\((?!http|#)([^)#]+)", PAGE):
        assert (ROOT / "docs" / target).exists(), target


def run(words: list[str], **options) -> str:
    """What a program says; fails with all of it."""
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=400, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    """A copy of the example, which building may leave files in."""
    return Path(shutil.copytree(EXAMPLE, tmp_path / "granite_policy"))


@pytest.fixture
def site(workplace: Path, tmp_path: Path) -> Path:
    """The example installed by pip into a folder of its own; its tests are not part of it."""
    source = shutil.copytree(workplace, tmp_path / "source")
    offline = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    run([sys.executable, "-m", "pip", "install", "-q", *offline, "--target", str(tmp_path / "site"), str(source)])
    assert (tmp_path / "site" / "granite_policy.py").is_file()
    (workplace / "granite_policy.py").unlink()  # what runs below is the installed one
    return tmp_path / "site"


def test_everything_on_the_page_runs(site: Path, workplace: Path) -> None:
    assert INSTALL in COMMANDS  # the fixture's part
    page = {"commands": [line for line in COMMANDS if line != INSTALL], "snippets": SNIPPETS}
    path = os.pathsep.join([str(site), str(workplace)])
    said = run(
        [sys.executable, "-B", "-c", DRIVER],
        input=json.dumps(page),
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        cwd=workplace,
    )
    assert re.findall(r"^passed: (.*)$", said, re.MULTILINE) == [*page["commands"], "snippets"]
    assert "GraniteForCausalLM by granite" in said
    assert "activations: model.layers.0.self_attn on rank" in said
    assert "Traceback" not in said
