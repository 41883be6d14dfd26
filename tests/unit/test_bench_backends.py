"""`bench backends`: what is refused before anything is measured, the table, the JSON, the plot, the profile."""

from __future__ import annotations

import io
import json
import sys

import pytest
from tuning_backends import BUCKETS, CLOCK, registry_of, scripted

from inference_shardformer import ConfigSources, InferenceConfig, ShardConfig
from inference_shardformer.attention.base import Reason
from inference_shardformer.cli import bench_backends_view
from inference_shardformer.cli.main import main
from inference_shardformer.config.loader import gather
from inference_shardformer.config.violations import ConfigViolations
from inference_shardformer.errors import BackendUnavailableError, ConfigError, MissingExtraError
from inference_shardformer.tuning import plot, session
from inference_shardformer.tuning.comparison import Comparison
from inference_shardformer.tuning.profile import TuningProfile

GRID = ("--batches", "1", "--lengths", "8", "--repeat", "1", "--set", "cache.block_size=4", "--device", "cpu")
NO = Reason("mood", "not today", "ask tomorrow")
PRICES = {"decode": [0.002], "prefill": [2e-5], "mixed": [3.0]}


def compared(*backends, requested: str = "auto", **inference: object) -> Comparison:
    config = InferenceConfig(dtype="fp32", attention={"backend": requested}, **inference)
    layers = gather(ConfigSources(environ={}), ShardConfig(device="cpu"), config)
    registry = registry_of(*backends, alone=True)
    (found,) = session.compare_backends(layers, None, BUCKETS, rounds=2, registry=registry, clock=CLOCK)
    return found


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    picky = type("Picky", (scripted("picky"),), {"reasons": classmethod(lambda _cls, _spec: [NO])})
    return compared(scripted("slow"), scripted("fast", seconds=PRICES), scripted("wrong", error=0.25), picky)


def shown(comparison: Comparison) -> str:
    stream = io.StringIO()
    bench_backends_view.show(comparison, stream)
    return stream.getvalue()


class TestTable:
    def test_every_row_with_its_verdict(self, comparison):
        lines = [line.split() for line in shown(comparison).splitlines()]
        assert ["decode", "2", "8", "fast", "2.00", "ms", "1,000", "0", "fastest"] in lines
        assert ["prefill", "1", "8", "fast", "20.0", "us", "400,000", "0", "fastest"] in lines
        assert ["mixed", "2", "8", "fast", "3.00", "s", "2", "0", "ok"] in lines
        assert ["mixed", "2", "8", "slow", "1.00", "s", "6", "0", "fastest"] in lines
        assert "picky cannot serve: not today [mood]" in shown(comparison)
        assert f"choice: fast: {comparison.why}" in shown(comparison)

    def test_the_disqualified_say_why(self, comparison):
        text = " ".join(shown(comparison).split())
        assert text.count("wrong - - 0.25 disqualified: it differs from the reference by up to 0.25") == 3

    def test_columns_are_aligned(self, comparison):
        places = {line.index("fast ") for line in shown(comparison).splitlines() if " fast " in line and "ok" in line}
        places |= {line.index("slow ") for line in shown(comparison).splitlines() if " slow " in line and "ok" in line}
        assert len(places) == 1

    def test_none_is_right(self):
        found = compared(scripted("wrong", error=1.0))
        assert (found.choice, found.why, found.fastest()) == (None, "", frozenset())
        assert "choice: none is right in every bucket" in shown(found)

    def test_several_ranks_are_said(self, comparison):
        two = Comparison(**{**vars(comparison), "num_ranks": 2})
        assert "the slowest of 2 ranks" in shown(two)


class TestSession:
    def test_the_json_is_stable(self, comparison):
        document = json.loads(json.dumps(comparison.to_json(), allow_nan=False))
        assert set(document) == {
            *("schema_version", "of", "layers", "device", "num_ranks", "rounds", "specs", "rows", "standings"),
            *("choice", "why", "refused", "fingerprint"),
        }
        row = {"phase": "prefill", "batch": 1, "length": 8, "backend": "slow", "seconds": 1.0, "max_error": 0.0}
        verdict = {"problem": "", "tokens_per_second": 8.0, "verdict": "ok", "is_fastest": False}
        assert document["rows"][1] == row | verdict
        assert [row["backend"] for row in document["rows"][:3]] == ["fast", "slow", "wrong"]
        assert [row["verdict"] for row in document["rows"][:3]] == ["ok", "ok", "disqualified"]
        assert [row["is_fastest"] for row in document["rows"][:3]] == [True, False, False]
        assert [standing["backend"] for standing in document["standings"]] == ["fast", "slow"]
        assert (document["choice"], document["refused"]) == ("fast", {"picky": "not today [mood]"})

    def test_a_named_backend_runs_alone(self):
        found = compared(scripted("a"), scripted("b"), requested="b")
        assert {row.backend for row in found.rows} == {"b"}

    def test_one_whose_constructor_fails_is_disqualified(self):
        def fail(*_args: object) -> None:
            raise OSError("no driver")

        found = compared(scripted("a"), scripted("b", __init__=fail))
        assert {row.problem for row in found.rows if row.backend == "b"} == {
            "attention backend 'b' could not be constructed: OSError: no driver"
        }
        assert found.choice == "a"

    def test_an_unknown_name_is_refused(self):
        with pytest.raises(BackendUnavailableError, match="unknown"):
            compared(scripted("a"), requested="nobody")

    def test_wrong_options_are_refused(self):
        layers = gather(ConfigSources(sets=("attention.options.sdpa.x=1",), environ={}))
        with pytest.raises(ConfigViolations, match="takes no options"):
            session.compare_backends(layers, None, BUCKETS, rounds=1)


class TestPlot:
    @pytest.mark.parametrize(("suffix", "head"), [("png", b"\x89PNG"), ("svg", b"<?xml")])
    def test_a_file_is_drawn(self, comparison, tmp_path, suffix, head):
        pytest.importorskip("matplotlib")
        path = tmp_path / f"plot.{suffix}"
        plot.check_plot(str(path))
        plot.draw(comparison, str(path))
        assert path.read_bytes().startswith(head)
        assert path.stat().st_size > 2000

    def test_a_file_that_cannot_be_written(self, comparison, tmp_path):
        pytest.importorskip("matplotlib")
        with pytest.raises(ConfigError, match="cannot be written"):
            plot.draw(comparison, str(tmp_path / "none" / "plot.png"))

    def test_without_matplotlib_the_extra_is_named(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        with pytest.raises(MissingExtraError) as caught:
            plot.check_plot(str(tmp_path / "plot.png"))
        assert "inference-shardformer[plot]" in caught.value.remedy
        assert (caught.value.code, caught.value.exit_code) == ("missing_extra", 3)


class TestCommand:
    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (("--phases", "decode,rest"), "--phases decode,rest: 'rest' is none"),
            (("--batches", "0"), "--batches 0: must be integers of at least 1"),
            (("--lengths", "8,"), "--lengths 8,: must be integers of at least 1"),
            (("--repeat", "x"), "--repeat x: must be integers of at least 1"),
            (("--repeat", "1,2"), "--repeat 1,2: must be one integer"),
            (("--plot", "p.jpeg"), "--plot p.jpeg: must end in .png or .svg"),
            (("--plot", "none/p.png"), "--plot none/p.png: its folder does not exist"),
            (("--save", "none/p.json"), "none/p.json: its folder does not exist"),
        ],
    )
    def test_what_is_wrong_is_said_before_anything_is_measured(self, monkeypatch, capsys, words, message):
        monkeypatch.setattr(session, "compare_backends", None)
        assert main(["bench", "backends", *words]) == 2
        assert message in capsys.readouterr().err

    def test_measured_saved_and_used(self, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        profile = "profile.json"
        words = ("--model", "demo", "--phases", "decode", *GRID)
        assert main(["bench", "backends", *words, "--json", "--save", profile]) == 0
        said = capsys.readouterr()
        document = json.loads(said.out)
        names = [row["backend"] for row in document["rows"]]
        assert names[-2:] == ["sdpa", "reference"]
        assert f"saved      {profile}" in said.err
        assert [entry.choice for entry in TuningProfile.load(profile).entries.values()] == [document["choice"]]
        sets = ("--set", "attention.backend=tuned", "--set", f"attention.profile={profile}")
        used = ("--set", "cache.block_size=4", "--device", "cpu", "--model", "demo", *sets)
        assert main(["explain", *used]) == 0
        assert f"tuned: profile {profile}, fastest of {len(names)}" in " ".join(capsys.readouterr().out.split())
        assert main(["explain", *used, "--dtype", "fp16"]) == 2
        assert "nothing was measured for" in capsys.readouterr().err

    def test_a_table_and_a_plot(self, tmp_path, capsys):
        pytest.importorskip("matplotlib")
        assert main(["bench", "backends", "--model", "demo", *GRID, "--plot", str(tmp_path / "p.svg")]) == 0
        assert capsys.readouterr().out.count("fastest") >= 3
        assert (tmp_path / "p.svg").stat().st_size > 2000

    def test_without_a_choice_the_exit_code_is_3(self, monkeypatch, capsys, tmp_path):
        wrong = compared(scripted("wrong", error=1.0))
        monkeypatch.setattr(session, "compare_backends", lambda *_args, **_options: (wrong,))
        assert main(["bench", "backends", "--save", str(tmp_path / "p.json")]) == 3
        assert "disqualified" in capsys.readouterr().out
        assert not list(tmp_path.iterdir())
