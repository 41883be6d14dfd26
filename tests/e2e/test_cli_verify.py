"""`verify` and `draft-policy`: exit codes, reports, and a drafted policy that goes from one to the other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from families_without_policy import family_config

from inference_shardformer.cli.main import main
from inference_shardformer.drafting.shrink import small_model

_BROKEN = """
from inference_shardformer.policies.llama import LlamaPolicy


class Broken(LlamaPolicy):
    def table(self, facts):
        return super().table(facts)[:-1]
"""


def test_the_demo_model_verifies(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--model", "demo", "--tp", "2", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["passed"]
    assert set(report["checks"].values()) == {"passed"}
    assert report["ranks"] == "simulated"


def test_a_wrong_policy_is_told_and_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "defective_policy.py").write_text(_BROKEN)
    monkeypatch.chdir(tmp_path)
    assert main(["verify", "--model", "demo", "--policy", "defective_policy:Broken"]) == 1
    out = capsys.readouterr().out
    assert "structure    FAILED" in out
    assert "structure: lm_head" in out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--policy", "no_colon"], "module:Class"),
        (["--policy", "nobody.has.this:Policy"], "cannot be imported"),
        (["--policy", "json:loads"], "no policy class"),
        (["--tp", "0"], "at least 1 rank"),
        (["--tp", "3"], "tp_size=3"),
    ],
)
def test_what_cannot_be_asked_is_refused(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--model", "demo", *words]) == 2
    assert told in capsys.readouterr().err


def test_a_drafted_policy_is_written_and_verifies_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = family_config("OlmoForCausalLM")
    if config is None:
        pytest.skip("this transformers has no Olmo")
    small_model(config, "OlmoForCausalLM").save_pretrained(tmp_path / "olmo")
    capsys.readouterr()
    assert main(["draft-policy", "--model", str(tmp_path / "olmo")]) == 0
    written = capsys.readouterr()
    assert "verified   on 1, 2, 4 simulated ranks" in written.err
    (tmp_path / "my_policy.py").write_text(written.out)
    monkeypatch.chdir(tmp_path)
    assert main(["verify", "--model", "olmo", "--policy", "my_policy.py:OlmoPolicy"]) == 0


def test_a_draft_with_open_questions_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = family_config("BloomForCausalLM")
    if config is None:
        pytest.skip("this transformers has no Bloom")
    config.save_pretrained(tmp_path)
    assert main(["draft-policy", "--model", str(tmp_path)]) == 1
    written = capsys.readouterr()
    assert "UNDECIDED" in written.out
    assert "undecided  " in written.err
