"""Plan files: stable text, and refusal by name of what does not fit a model, its ranks, or itself."""

from __future__ import annotations

import copy
import difflib
import json
from pathlib import Path

import pytest
from tiny_models import save_tiny_model

from inference_shardformer import ConfigSources, InferenceConfig, InferenceShardformer, ShardConfig, plan_model
from inference_shardformer.errors import PlanFileError
from inference_shardformer.huggingface import build_on_meta, load_hf_config
from inference_shardformer.policies.llama import LlamaPolicy
from inference_shardformer.sharded import plan_ranks, planned_tensors
from inference_shardformer.sharding.plan_document import parse_document
from inference_shardformer.sharding.plan_file import PlanFile

NOTHING = ConfigSources(environ={})
QKV = "model.layers.0.self_attn.qkv_proj.weight"
GATE_UP = "model.layers.0.mlp.gate_up_proj.weight"
DOWN = "model.layers.0.mlp.down_proj.weight"
O_PROJ = "model.layers.1.self_attn.o_proj.weight"
EMBED = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    save_tiny_model("odd_vocabulary", path)
    return path


def fresh(folder: Path, tp_size: int):
    """The plans of a checkpoint as loading makes them, and its tensors."""
    hf_config = load_hf_config(folder, trust_remote_code=False)
    policy = LlamaPolicy()
    facts, model = policy.facts(hf_config), build_on_meta(hf_config, "LlamaForCausalLM")
    return plan_ranks(policy, facts, model, tp_size=tp_size), planned_tensors(policy, facts, model)


@pytest.fixture(scope="module")
def two_ranks(folder):
    return fresh(folder, 2)


@pytest.fixture(scope="module")
def content(two_ranks) -> dict:
    return json.loads(PlanFile.of(*two_ranks, policy="llama").document.to_text())


def load(document: dict, plans, tensors, *, policy: str = "llama"):
    """What loading makes of an edited document."""
    file = PlanFile(parse_document(json.dumps(document), "plan file p.json"), "plan file p.json")
    return file.plans_for(plans, tensors, policy=policy)


def edited(content: dict, change) -> dict:
    document = copy.deepcopy(content)
    change(document)
    return document


def slices(document: dict, parameter: str, rank: int = 0) -> list:
    return document["parameters"][parameter]["ranks"][rank]["slices"]


class TestText:
    def test_what_was_planned_comes_back(self, two_ranks, tmp_path):
        plans, tensors = two_ranks
        PlanFile.of(plans, tensors, policy="llama").write(tmp_path / "plan.json")
        read = PlanFile.read(tmp_path / "plan.json")
        assert read.plans_for(plans, tensors, policy="llama") == plans
        assert read.document.to_text() == (tmp_path / "plan.json").read_text()

    def test_every_parameter_module_and_tensor_has_a_line(self, two_ranks):
        plans, tensors = two_ranks
        lines = PlanFile.of(plans, tensors, policy="llama").document.to_text().splitlines()
        for name in [parameter.name for parameter in plans[0].parameters]:
            (line,) = [line for line in lines if line.startswith(f'    "{name}": {{"module"')]
            assert line.count('"shape"') == 2

    def test_plans_of_two_vocabularies_differ_in_the_lines_about_them(self, two_ranks, tmp_path):
        save_tiny_model("gqa", tmp_path)
        texts = [PlanFile.of(*plan, policy="llama").document.to_text() for plan in (two_ranks, fresh(tmp_path, 2))]
        changes = [line for line in difflib.ndiff(*map(str.splitlines, texts)) if line.startswith("- ")]
        names = ("fingerprint", "vocab_ranges", "vocab_size", "embed_tokens", "lm_head", "embed_tokens", "lm_head")
        assert len(changes) == len(names)
        assert all(name in line for name, line in zip(names, changes, strict=True))

    def test_it_is_made_without_weights_and_the_same(self, folder, tmp_path):
        (tmp_path / "config.json").write_text((folder / "config.json").read_text())
        texts = {
            plan_model(path, ShardConfig(tp_size=4), sources=NOTHING).file.document.to_text()
            for path in (folder, tmp_path)
        }
        assert len(texts) == 1


class TestReading:
    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("", "is not JSON"),
            ("[]", "is not a plan"),
            ('{"format": "other"}', "is not a plan"),
            ('{"format": "inference-shardformer sharding plan", "schema_version": 2}', "has schema_version 2"),
            ('{"format": "inference-shardformer sharding plan"}', "has schema_version None"),
            ('{"format": "inference-shardformer sharding plan", "schema_version": 1}', "tp_size: Field required"),
        ],
    )
    def test_what_is_no_plan_is_refused(self, tmp_path, text, said):
        (tmp_path / "plan.json").write_text(text)
        with pytest.raises(PlanFileError, match=said) as caught:
            PlanFile.read(tmp_path / "plan.json")
        assert str(tmp_path / "plan.json") in caught.value.message

    def test_unreadable_and_unwritable(self, tmp_path, two_ranks):
        with pytest.raises(PlanFileError, match="cannot be read"):
            PlanFile.read(tmp_path / "absent.json")
        with pytest.raises(PlanFileError, match="cannot be written"):
            PlanFile.of(*two_ranks, policy="llama").write(tmp_path / "absent" / "plan.json")

    @pytest.mark.parametrize(
        "change",
        [
            lambda d: d.update(ranks=2),
            lambda d: slices(d, QKV)[0].pop(),
            lambda d: slices(d, QKV)[0].__setitem__(2, 1.5),
            lambda d: d["modules"].update({"x": ["row"]}),
        ],
    )
    def test_lost_shapes_are_named(self, content, two_ranks, change):
        with pytest.raises(PlanFileError, match=r"plan file p\.json: \w+"):
            load(edited(content, change), *two_ranks)


class TestIdentity:
    def test_another_model(self, content, tmp_path):
        save_tiny_model("gqa", tmp_path)
        with pytest.raises(PlanFileError, match="another model: vocab_size is 157 in the plan and 160 in the model"):
            load(content, *fresh(tmp_path, 2))

    def test_another_shape_with_the_same_facts(self, content, two_ranks):
        plans, tensors = two_ranks
        others = {name: info for name, info in tensors.items() if not name.startswith("model.norm")}
        with pytest.raises(PlanFileError, match=r"model\.norm\.weight is \[64\] in the plan and absent in the model"):
            load(content, plans, others)

    def test_another_number_of_ranks(self, content, folder):
        with pytest.raises(PlanFileError, match=r"made for tp_size 2, and the model is loaded on 4 rank\(s\)"):
            load(content, *fresh(folder, 4))

    def test_another_policy(self, content, two_ranks):
        with pytest.raises(PlanFileError, match="made by llama, and the model is sharded by mine"):
            load(content, *two_ranks, policy="mine")

    @pytest.mark.parametrize(
        "change", [lambda d: d["model"].update(vocab_size=160), lambda d: d["tensors"].update({EMBED: [160, 64]})]
    )
    def test_edited_facts(self, content, two_ranks, change):
        with pytest.raises(PlanFileError, match="do not belong to its fingerprint"):
            load(edited(content, change), *two_ranks)

    def test_loading_refuses_it_before_any_weight_is_read(self, content, folder, tmp_path):
        (tmp_path / "plan.json").write_text(json.dumps(content))
        with InferenceShardformer(inference_config=InferenceConfig(dtype="fp32"), sources=NOTHING) as shardformer:
            with pytest.raises(PlanFileError, match="made for tp_size 2"):
                shardformer.from_pretrained(folder, plan=tmp_path / "plan.json")
        with InferenceShardformer(inference_config=InferenceConfig(dtype="fp32"), sources=NOTHING) as shardformer:
            with pytest.raises(PlanFileError, match="cannot be read"):
                shardformer.from_pretrained(folder, plan=tmp_path / "absent.json")


CHANGES = {
    "missing_parameter": (lambda d: d["parameters"].pop(DOWN), f"parameter {DOWN} is missing"),
    "unknown_parameter": (
        lambda d: d["parameters"].update({"x.weight": d["parameters"][DOWN]}),
        "parameter x.weight is not one of the model",
    ),
    "other_module": (lambda d: d["parameters"][DOWN].update(module="model.norm"), f"parameter {DOWN} is model.norm"),
    "missing_module": (lambda d: d["modules"].pop("model.norm"), "module model.norm is missing"),
    "other_style": (lambda d: d["modules"]["model.norm"].__setitem__(1, "row"), "module model.norm is"),
    "other_replacement": (lambda d: d["replaced"].pop("model.layers.0.mlp"), "replaced module model.layers.0.mlp"),
    "shape": (
        lambda d: d["parameters"][DOWN]["ranks"][1].update(shape=[64, 49]),
        f"{DOWN} on rank 1: its shape is [64, 49], the module needs [64, 48]",
    ),
    "ranks": (lambda d: d["parameters"][DOWN]["ranks"].pop(), f"{DOWN}: has 1 rank(s), the plan 2"),
    "vocab": (lambda d: d["vocab_ranges"].reverse(), "vocab_ranges are"),
    "unknown_tensor": (lambda d: slices(d, DOWN)[0].__setitem__(0, "x"), "takes a slice of x, which is not among"),
    "axis": (lambda d: slices(d, DOWN)[0].__setitem__(1, 2), "takes axis 2 of model.layers.0.mlp.down_proj.weight"),
    "beyond_the_tensor": (lambda d: slices(d, DOWN)[0].__setitem__(3, 97), "takes [0, 97)"),
    "empty": (lambda d: slices(d, DOWN)[0].__setitem__(3, 0), "takes [0, 0)"),
    "beyond_the_parameter": (lambda d: slices(d, GATE_UP)[1].__setitem__(4, 60), "puts 48 of"),
    "negative_offset": (lambda d: slices(d, GATE_UP)[1].__setitem__(4, -1), "puts 48 of"),
    "wrong_axis": (lambda d: slices(d, O_PROJ)[0].__setitem__(1, 0), "differ beside axis 0"),
    "overlap": (lambda d: slices(d, GATE_UP)[1].__setitem__(4, 40), "its slices overlap at 40"),
    "taken_twice": (
        lambda d: slices(d, GATE_UP)[1].__setitem__(0, "model.layers.0.mlp.gate_proj.weight"),
        "takes model.layers.0.mlp.gate_proj.weight twice from 0",
    ),
    "not_covered": (
        lambda d: slices(d, DOWN, 1)[0].__setitem__(slice(2, 4), [0, 48]),
        "model.layers.0.mlp.down_proj.weight: no rank takes it from 48",
    ),
    "nothing_taken": (lambda d: slices(d, "model.norm.weight", 0).clear() or slices(d, "model.norm.weight", 1).clear(),
                      "model.norm.weight: no rank takes it from 0"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_not_consistent_is_refused_by_name(content, two_ranks, name):
    change, said = CHANGES[name]
    with pytest.raises(PlanFileError) as caught:
        load(edited(content, change), *two_ranks)
    assert said in caught.value.message
    assert "is not consistent" in caught.value.message


def exchange(document: dict, *parameters: str) -> None:
    for parameter in parameters:
        document["parameters"][parameter]["ranks"].reverse()


class TestArrangement:
    def test_the_parts_of_a_whole_block_may_change_ranks(self, content, two_ranks):
        layer = [name for name in content["parameters"] if name.startswith("model.layers.0.")]
        loaded = load(edited(content, lambda d: exchange(d, *layer)), *two_ranks)
        parts = [{each.name: each.slices for each in plan.parameters} for plan in (*loaded, *two_ranks[0])]
        for name in parts[0]:
            assert parts[0][name] == parts[3 if name in layer else 2][name]
        assert parts[0][DOWN] != parts[2][DOWN]

    @pytest.mark.parametrize("parameters", [[GATE_UP], [DOWN], [QKV], [GATE_UP, DOWN, QKV]])
    def test_those_of_one_parameter_alone_may_not(self, content, two_ranks, parameters):
        with pytest.raises(PlanFileError, match="the parts of its parameters do not belong together"):
            load(edited(content, lambda d: exchange(d, *parameters)), *two_ranks)

    def test_equal_parts_of_two_sources_may_not_change_places(self, content, two_ranks):
        def change(document):
            for rank in (0, 1):
                gate, up = slices(document, GATE_UP, rank)
                gate[4], up[4] = up[4], gate[4]

        with pytest.raises(PlanFileError, match=r"model\.layers\.0\S*: the parts"):
            load(edited(content, change), *two_ranks)

    def test_what_stands_alone_stays_where_it_is(self, tmp_path):
        save_tiny_model("gqa", tmp_path)
        plans, tensors = fresh(tmp_path, 2)
        document = json.loads(PlanFile.of(plans, tensors, policy="llama").document.to_text())
        with pytest.raises(PlanFileError, match=f"{EMBED}: differs from what the policy plans"):
            load(edited(document, lambda d: exchange(d, EMBED)), plans, tensors)
