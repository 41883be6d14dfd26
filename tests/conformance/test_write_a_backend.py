"""docs/write-a-backend.md: its files are the example's, and everything on the page runs with the example installed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "docs" / "examples" / "chunked_attention"
PAGE = (ROOT / "docs" / "write-a-backend.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
SNIPPETS = [text for language, title, text in BLOCKS if language == "python" and not title]
COMMANDS = [line for language, _, text in BLOCKS if language == "bash" for line in text.splitlines()]

# One process, as importing torch takes longest. Every part prints its name when it has passed.
DRIVER = """
import json, shlex, sys
from pathlib import Path

import pytest

from inference_shardformer.cli.main import main

page = json.loads(sys.stdin.read())
for command in page["commands"]:
    program, *arguments = shlex.split(command)
    run = {"pytest": lambda given: pytest.main([*given, "-q", "-p", "no:cacheprovider"]), "inference-shardformer": main}
    try:
        code = run[program](arguments)
    except SystemExit as exc:
        code = exc.code
    assert not code, f"{command} ended with {code}"
    print("passed:", program, flush=True)
names = {}
for snippet in page["snippets"]:
    exec(compile(snippet, "write-a-backend.md", "exec"), names)
print("passed: snippets", flush=True)
exec(compile(page["generate"], "generate.py", "exec"), {"__name__": "__main__"})
print("passed: generate.py", flush=True)
"""


def test_every_file_of_the_example_is_on_the_page() -> None:
    shown = {title: text for _, title, text in BLOCKS if title}
    files = {path.name: path.read_text(encoding="utf-8") for path in EXAMPLE.iterdir() if path.is_file()}
    assert shown == files


def test_what_the_page_links_to_exists() -> None:
    for target in re.findall(r"\]\((?!http|#)([^)#]+)", PAGE):
        assert (ROOT / "docs" / target).exists(), target
    headings = {re.sub(r"[^a-z0-9]+", "-", line.lstrip("# ").lower()) for line in PAGE.splitlines() if line[:1] == "#"}
    assert set(re.findall(r"\]\(#([^)]+)\)", PAGE)) <= headings


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """What installing the example leaves behind: its metadata with the entry points of its pyproject.toml."""
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    info = tmp_path / f"chunked_attention-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    lines = []
    for group, points in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {target}" for name, target in points.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_everything_on_the_page_runs(site: Path) -> None:
    assert COMMANDS[1] == "pip install docs/examples/chunked_attention"  # the fixture's part
    generate = (EXAMPLE / "generate.py").read_text(encoding="utf-8")
    assert '"path/to/llama"' in generate
    model = str(ROOT / "inference_shardformer" / "demo_model")
    page = {
        "commands": [line for line in COMMANDS if not line.startswith("pip ")],
        "snippets": SNIPPETS,
        "generate": generate.replace('"path/to/llama"', repr(model)),
    }
    path = os.pathsep.join([str(site), str(EXAMPLE)])
    done = subprocess.run(
        [sys.executable, "-B", "-c", DRIVER],
        input=json.dumps(page),
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        cwd=EXAMPLE,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    passed = re.findall(r"^passed: (.*)$", done.stdout, re.MULTILINE)
    assert passed == ["pytest", "inference-shardformer", "snippets", "generate.py"], done.stdout + done.stderr
    assert done.returncode == 0
    assert re.search(r"chunk_size +64 +call argument", done.stdout)
    assert "Traceback" not in done.stderr
