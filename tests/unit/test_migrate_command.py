"""`inference-shardformer migrate`: what it prints, what it writes, and its exit codes."""

from __future__ import annotations

import json

import pytest
from foreign_scripts import README

from inference_shardformer.cli.main import main


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "readme.py"
    path.write_text(README)
    return str(path)


@pytest.fixture
def refused(tmp_path):
    path = tmp_path / "refused.json"
    path.write_text('{"block_size": 32, "use_spec_dec": true}')
    return str(path)


def test_settings_on_standard_output_and_the_report_beside_it(script, capsys):
    assert main(["migrate", script]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("schema_version: 1\ninference:\n  dtype: fp16\n")
    assert "InferenceConfig on line 11" in err
    assert "renamed (1)\n  line 13     max_batch_size = 4\n" in err
    assert "-> inference.scheduler.max_num_seqs = 4" in err


def test_to_a_file_and_again(script, tmp_path, capsys):
    out = str(tmp_path / "run.toml")
    assert main(["migrate", script, "--to", out]) == 0
    assert capsys.readouterr().out == ""
    first = (tmp_path / "run.toml").read_text()
    assert first.startswith("schema_version = 1\n")
    assert main(["migrate", out, "--to", out]) == 0
    assert (tmp_path / "run.toml").read_text() == first
    assert "nothing to migrate" in capsys.readouterr().err


def test_a_refusal_writes_nothing_unless_partial(refused, tmp_path, capsys):
    out = tmp_path / "run.yaml"
    assert main(["migrate", refused, "--to", str(out)]) == 2
    assert main(["migrate", refused]) == 2
    assert not out.exists()
    printed, err = capsys.readouterr()
    assert printed == ""
    assert "refused (1)\n  line 1      use_spec_dec = true\n" in err
    assert "nothing was written" in err
    assert main(["migrate", refused, "--to", str(out), "--partial"]) == 2
    assert "block_size: 32" in out.read_text()


def test_json_is_one_stable_object(script, refused, capsys):
    assert main(["migrate", script, "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    found = json.loads(line)
    assert list(found) == [
        *("file", "origin", "from_version", "schema_version", "complete", "written", "config"),
        *("upgraded", "same", "renamed", "changed", "dropped", "refused", "unknown", "undecided"),
    ]
    assert found["complete"] is True
    assert found["config"]["inference"]["max_model_len"] == 1536
    assert found["renamed"] == [
        {
            "name": "max_batch_size",
            "given": "max_batch_size = 4",
            "line": 13,
            "becomes": {"inference.scheduler.max_num_seqs": 4},
            "reason": "sequences in one step; the cache is sized for as many of them where it fits",
        }
    ]
    assert main(["migrate", refused, "--json"]) == 2
    found = json.loads(capsys.readouterr().out)
    assert (found["complete"], found["written"], found["refused"][0]["name"]) == (False, None, "use_spec_dec")


def test_errors_are_blocks(script, tmp_path, capsys):
    assert main(["migrate", script, "--to", "x.py"]) == 2
    assert "error: --to x.py: unknown format" in capsys.readouterr().err
    assert main(["migrate", script, "--to", str(tmp_path / "no" / "x.yaml"), "--json"]) == 2
    out, err = capsys.readouterr()
    assert "cannot be written" in err
    assert json.loads(out)["error"]["code"] == "config"
    assert main(["migrate", script, "--call", "1"]) == 2
    assert "InferenceConfig on line 11" in capsys.readouterr().err
