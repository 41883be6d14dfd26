"""Explanations made offline: their object, their text, their command, and plug-ins with options of their own."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from pydantic import BaseModel, ConfigDict, Field
from tiny_models import save_tiny_model, tiny_model

from inference_shardformer import ConfigSources, InferenceConfig, InferenceShardformer, ShardConfig, explain
from inference_shardformer.attention.base import AttentionSpec
from inference_shardformer.attention.contract import contract_problem
from inference_shardformer.attention.reference import ReferenceAttention
from inference_shardformer.attention.survey import BACKENDS
from inference_shardformer.cli.main import main
from inference_shardformer.compute import cpu_linear
from inference_shardformer.compute.base import ComputeKind, ComputeSpec
from inference_shardformer.compute.cpu_linear import compresses
from inference_shardformer.config.fields import all_fields
from inference_shardformer.config.violations import ConfigViolations
from inference_shardformer.errors import CheckpointError, TensorParallelSizeError
from inference_shardformer.explaining.text import aligned
from inference_shardformer.kernels.cpu.library import native_problem
from inference_shardformer.resolving.preparation import agreed_facts

NOTHING = ConfigSources(environ={})
COMPRESSION = "inference.weights.compression"
needs_native = pytest.mark.skipif(native_problem() is not None, reason="there are no native kernels")


def sets(*texts: str) -> ConfigSources:
    return ConfigSources(environ={}, sets=texts)


class ToyOptions(BaseModel):
    """What a plug-in declares."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    tile: int = Field(default=4, ge=1, le=64, description="Keys at a time.")
    mode: str = "plain"
    extents: tuple[int, ...] = ()


class ToyAttention(ReferenceAttention):
    """A backend with options."""

    name: ClassVar[str] = "toy"
    Options = ToyOptions

    def __init__(self, spec: AttentionSpec, options: ToyOptions) -> None:
        super().__init__(spec, options)
        self.tile = options.tile


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    save_tiny_model("gqa", path)
    return path


@pytest.fixture
def toy():
    """The toy backend, registered as a plug-in would be, for one test."""
    BACKENDS.names()
    BACKENDS.register("toy", ToyAttention)
    yield "toy"
    del BACKENDS._entries["toy"]


def values(explanation) -> dict[str, dict]:
    return {item["path"]: item for item in explanation.to_json()["values"]}


def test_without_a_model_what_needs_one_says_so():
    explanation = explain(sources=sets("cache.block_size=8"))
    told = values(explanation)
    needing = {path for path, item in told.items() if item["reason"] == "needs a model"}
    kernels = {f"inference.kernels.{kind.value}" for kind in ComputeKind}
    assert needing == {
        "inference.dtype",
        "inference.max_model_len",
        "inference.attention.backend",
        "inference.cache.prefix_caching",
        "inference.graphs",
        COMPRESSION,
        *kernels,
    }
    assert told["inference.cache.block_size"]["beaten"] == [{"value": "auto", "origin": "default", "level": "default"}]
    document = explanation.to_json()
    assert (document["model"], document["attention"], document["ranks"]) == (None, None, [])
    assert set(told) == {path for path, field in all_fields().items() if not field.is_open}
    assert "no model" in str(explanation)


def test_explaining_reads_no_weights_and_joins_no_ranks(folder, tmp_path):
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())  # and nothing else
    explanation = explain(tmp_path, ShardConfig(tp_size=4), sources=NOTHING)
    assert not torch.distributed.is_initialized()
    document = explanation.to_json()
    assert [rank["rank"] for rank in document["ranks"]] == [0, 1, 2, 3]
    assert document["model"]["architecture"] == "LlamaForCausalLM"
    assert document["values"][0]["value"] == 4
    assert document["values"][0]["origin"] == "call argument"


@pytest.mark.parametrize("case", ["gqa", "tied", "odd_vocabulary"])
def test_the_bytes_of_one_rank_are_those_of_the_model(tmp_path, case):
    model = save_tiny_model(case, tmp_path)
    plain = InferenceConfig.model_validate({"kernels": {"linear": "torch"}})  # which keeps weights as they are
    explanation = explain(tmp_path, None, plain, sources=NOTHING)
    held = {parameter.data_ptr(): parameter.nbytes for parameter in model.parameters()}
    assert explanation.rank_bytes == (sum(held.values()),)


def test_headers_are_compared_where_they_are_there(folder, tmp_path):
    text = (folder / "config.json").read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 3')
    (tmp_path / "config.json").write_text(text)
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"layers\.2"):
        explain(tmp_path, sources=NOTHING)


def test_what_loading_would_refuse_is_refused(folder):
    with pytest.raises(TensorParallelSizeError):
        explain(folder, ShardConfig(tp_size=3), sources=NOTHING)
    with pytest.raises(ConfigViolations) as caught:
        explain(folder, sources=sets("tp_size=3", "max_model_len=9999", "cache.blocks=2"))
    assert len(caught.value.violations) == 3
    with pytest.raises(ConfigViolations, match="unknown attention backend"):
        explain(sources=sets("attention.backend=spda", "cache.blocks=2"))


def test_an_object_survives_json(folder):
    document = explain(folder, sources=NOTHING).to_json()
    assert json.loads(json.dumps(document)) == json.loads(json.dumps(explain(folder, sources=NOTHING).to_json()))
    (group,) = document["attention"]["groups"]
    assert (group["layers"], group["ranks"]) == ([0, 1], [0])
    assert group["spec"]["num_kv_heads"] == "4"
    origin = "inference_shardformer.attention.sdpa:SdpaAttention"
    verdicts = {each["name"]: each for each in group["candidates"]}
    assert [name for name, each in verdicts.items() if each["verdict"] == "chosen"] == [group["chosen"]]
    assert set(verdicts["reference"]) == {"name", "origin", "verdict", "reasons"}
    assert (verdicts["sdpa"]["origin"], verdicts["sdpa"]["reasons"]) == (origin, [])


class TestOptions:
    @pytest.mark.parametrize(
        ("setting", "path", "rule", "remedy"),
        [
            ("tile=0", "tile", "an integer, at least 1, at most 64", "leave it out"),
            ("tile=big", "tile", "an integer, at least 1, at most 64", "leave it out"),
            ("tyle=3", "tyle", "the name of an option of attention backend toy: tile, mode", "options.toy.tile?"),
            ("extents=[1, x]", "extents", "", "leave it out"),
        ],
    )
    def test_the_plug_in_validates_them(self, toy, folder, setting, path, rule, remedy):
        for chosen in ("toy", "auto"):
            with pytest.raises(ConfigViolations) as caught:
                explain(folder, sources=sets(f"attention.backend={chosen}", f"attention.options.toy.{setting}"))
            violation = caught.value.violations[0]
            assert violation.path == f"inference.attention.options.toy.{path}"
            assert violation.rule.startswith(rule)
            assert remedy in violation.remedy
            assert str(violation.origin) == f"option --set attention.options.toy.{setting}"

    def test_they_are_explained_and_handed_over_typed(self, toy, tmp_path):
        (tmp_path / "run.yaml").write_text("inference: {attention: {backend: toy, options: {toy: {tile: 8}}}}\n")
        config = InferenceConfig(attention={"options": {"toy": {"tile": 16}}}, dtype="fp32")
        sources = ConfigSources(environ={}, files=(tmp_path / "run.yaml",))
        with InferenceShardformer(inference_config=config, sources=sources) as shardformer:
            shardformer.optimize(tiny_model("gqa"))
            told = values(shardformer.explain())
            backend = shardformer.sharded.model.model.layers[0].self_attn.backend
        assert isinstance(backend, ToyAttention)
        assert backend.options == ToyOptions(tile=16)
        assert backend.tile == 16
        tile = told["inference.attention.options.toy.tile"]
        assert (tile["value"], tile["origin"]) == (16, "call argument")
        assert tile["beaten"] == [{"value": 8, "origin": f"file {tmp_path}/run.yaml:1", "level": "file"}]
        assert told["inference.attention.options.toy.mode"]["origin"] == "default"

    def test_without_options_the_plug_in_gets_its_defaults(self, toy, folder):
        told = values(explain(folder, sources=sets("attention.backend=toy")))
        assert told["inference.attention.options.toy.tile"]["value"] == 4

    def test_options_of_another_backend_cannot_take_effect(self, toy, folder):
        with pytest.raises(ConfigViolations, match=r"the attention backend is \w+"):
            explain(folder, sources=sets("attention.options.toy.tile=8"))
        permissive = explain(folder, sources=sets("attention.options.toy.tile=8", "strict=false"))
        (event,) = permissive.events
        assert event.path == "inference.attention.options.toy.tile"
        assert "inference.attention.options.toy.tile" not in values(permissive)

    def test_without_a_model_they_are_checked_and_told(self, toy):
        told = values(explain(sources=sets("attention.options.toy.tile=8")))
        assert told["inference.attention.options.toy.tile"]["value"] == 8
        with pytest.raises(ConfigViolations, match="at most 64"):
            explain(sources=sets("attention.options.toy.tile=65"))

    @pytest.mark.parametrize(
        ("declared", "problem"), [(dict, "not a subclass"), (BaseModel, "frozen=True"), (3, "not a subclass")]
    )
    def test_a_declaration_that_is_none_breaks_the_contract(self, declared, problem):
        broken = type("Broken", (ToyAttention,), {"Options": declared})
        assert problem in contract_problem(broken)


class TestCompression:
    def told(self, folder: Path, *texts: str) -> dict:
        return values(explain(folder, ShardConfig(tp_size=1, device="cpu"), sources=sets(*texts)))[COMPRESSION]

    @needs_native
    @pytest.mark.parametrize(
        ("texts", "reason"),
        [
            (("dtype=fp32",), "weights in float32 are not compressed, only those in bfloat16"),
            (("dtype=bf16", "weights.quantization=int8"), "weights in int8 are not compressed any further"),
            (("dtype=bf16", "kernels.linear=torch"), "linear kernel torch compresses no weights"),
            (("dtype=bf16", "weights.compression=none"), ""),
        ],
    )
    def test_why_weights_are_kept_as_they_are(self, folder, texts, reason):
        told = self.told(folder, *texts)
        assert (told["value"], told["reason"]) == ("none", reason)
        assert (told["beaten"] != []) == (not reason)

    @needs_native
    def test_a_level_that_gains_nothing_compresses_only_what_it_is_asked_to(self, folder, monkeypatch):
        monkeypatch.setattr(cpu_linear, "compression_gains", lambda: False)
        told = self.told(folder, "dtype=bf16")
        assert told["value"] == "none"
        assert re.fullmatch(r"the instruction-set level \w+ gains nothing by compressed weights", told["reason"])
        asked = self.told(folder, "dtype=bf16", "weights.compression=lossless")
        assert (asked["value"], asked["reason"]) == ("lossless", "")

    @needs_native
    def test_compressed_weights_are_told_offline_and_live_alike(self, folder):
        if not compresses(ComputeSpec(torch.device("cpu"), torch.bfloat16, 8, 8), torch.bfloat16):
            pytest.skip("this machine gains nothing by compressed weights")
        told = self.told(folder, "dtype=bf16")
        assert (told["value"], told["origin"]) == ("lossless", "default")
        assert told["reason"] == "bfloat16 weights are kept in 12 bits each, and read back bit for bit"
        assert self.told(folder, "dtype=bf16", "weights.compression=lossless")["value"] == "lossless"
        with InferenceShardformer(ShardConfig(device="cpu"), sources=sets("dtype=bf16")) as shardformer:
            engine = shardformer.attach(shardformer.from_pretrained(folder))
            assert values(shardformer.explain())[COMPRESSION] == told
            assert engine.config.get(COMPRESSION) == "lossless"

    def test_each_rank_decides_for_itself(self, folder):
        with InferenceShardformer(ShardConfig(device="cpu"), sources=sets("dtype=bf16")) as shardformer:
            shardformer.from_pretrained(folder)
            assert agreed_facts(shardformer._prepared)[COMPRESSION] == "auto"


class TestText:
    def test_lines_fit_and_columns_align(self):
        rows = [("group", "", ""), ("  a", "1", "short"), ("  longer", "22", "words " * 12)]
        lines = aligned(("name", "value", "why"), rows, 40)
        assert max(map(len, lines)) <= 40
        assert {line.index("words") for line in lines if "words" in line} == {lines[0].index("why")}
        assert lines[1] == "group"

    @pytest.mark.parametrize("width", [80, 100, 120])
    def test_an_explanation_fits_its_width(self, folder, width):
        text = explain(folder, sources=sets("cache.block_size=8")).as_text(width)
        assert max(len(line) for line in text.splitlines() if not line.startswith("model")) <= width
        for said in ("inference.cache", "option --set cache.block_size=8", "instead of auto (default)", "chosen"):
            assert said in " ".join(text.split())

    def test_a_request_may_bring_its_own(self):
        assert "a request" in str(explain(sources=NOTHING))


class TestCommand:
    def test_json_and_text_say_the_same(self, folder, capsys, monkeypatch):
        monkeypatch.setenv("INFERENCE_SHARDFORMER_INFERENCE__SEED", "5")
        words = ["explain", "--model", str(folder), "--tp", "2", "--temperature", "0.5", "--set", "cache.block_size=8"]
        assert main([*words, "--json"]) == 0
        document = json.loads(capsys.readouterr().out)
        told = {item["path"]: item for item in document["values"]}
        assert told["shard.tp_size"]["origin"] == "option --tp"
        assert told["inference.seed"]["origin"] == "variable INFERENCE_SHARDFORMER_INFERENCE__SEED"
        assert len(document["ranks"]) == 2
        assert main(words) == 0
        text = capsys.readouterr().out
        for item in told.values():
            assert item["path"].rpartition(".")[2] in text

    def test_a_terminal_gets_a_table(self, folder, capsys, monkeypatch):
        monkeypatch.setattr("sys.stdout.isatty", lambda: True)
        monkeypatch.setenv("COLUMNS", "80")
        assert main(["explain", "--model", str(folder), "--set", "strict=false", "--top-k", "3"]) == 0
        lines = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out).splitlines()
        assert max(map(len, lines)) <= 80
        assert any("─" in line for line in lines)
        assert any(line.startswith("let pass: ") for line in lines)

    def test_errors_are_those_of_loading(self, folder, capsys):
        assert main(["explain", "--model", str(folder), "--tp", "3", "--json"]) == 2
        assert json.loads(capsys.readouterr().out)["error"]["code"] == "tp_size"
        assert main(["explain", "--set", "nothing=1"]) == 2
