"""The bridge's class, its configurations, and that nothing of ColossalAI reaches the core."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from tiny_models import hf_greedy, save_tiny_model, tiny_model
from torch import nn

from inference_shardformer import InferenceConfig, InferenceShardformer, SamplingParams, ShardConfig
from inference_shardformer.bridges.colossalai import (
    ColossalInferenceShardformer,
    InferenceEngine,
    InferencePolicy,
    LlamaInferencePolicy,
)
from inference_shardformer.bridges.colossalai import InferenceConfig as Scripts
from inference_shardformer.bridges.colossalai.installing import IMPORTED, VERSION
from inference_shardformer.bridges.colossalai.mending import cpu_defects, mended_cpu_accelerator, unchanged_environment
from inference_shardformer.bridges.colossalai.status import MENDED, bridge_status
from inference_shardformer.bridges.colossalai.upstream import (
    CpuAccelerator,
    LlamaForCausalLMPolicy,
    ModelSharder,
    ModulePolicyDescription,
    Policy,
    ShardFormer,
)
from inference_shardformer.bridges.colossalai.upstream import ShardConfig as ColossalShardConfig
from inference_shardformer.errors import ConfigError, PolicyError, StateError
from inference_shardformer.policies.llama import LlamaPolicy

ROOT = Path(__file__).parents[2]
ALONE = ColossalShardConfig(enable_tensor_parallelism=False)
SMALL = InferenceConfig.model_validate({"dtype": "fp32", "cache": {"num_blocks": 8}})
PROMPT = [3, 1, 4, 1, 5]


def test_it_is_a_shardformer_of_both():
    assert issubclass(ColossalInferenceShardformer, InferenceShardformer)
    assert issubclass(ColossalInferenceShardformer, ShardFormer)
    assert issubclass(InferencePolicy, Policy)
    assert issubclass(LlamaInferencePolicy, LlamaForCausalLMPolicy)
    with ColossalInferenceShardformer(ALONE) as shardformer:
        assert shardformer.shard_config is ALONE


@pytest.mark.parametrize("policy", [None, LlamaPolicy(), LlamaInferencePolicy(), InferencePolicy(LlamaPolicy())])
@pytest.mark.parametrize("shard_config", [ALONE, ShardConfig(tp_size=1), None], ids=["theirs", "ours", "none"])
def test_model_sharder_places_our_modules(monkeypatch, policy, shard_config):
    ran = []
    shard = ModelSharder.shard
    monkeypatch.setattr(ModelSharder, "shard", lambda self: ran.append(type(self.policy).__name__) or shard(self))
    native = tiny_model("tied")
    expected = hf_greedy(native, PROMPT, 4)
    with ColossalInferenceShardformer(shard_config, SMALL) as shardformer:
        model, shared = shardformer.optimize(native, policy)
        assert (model, shared) == (native, [])
        assert ran == ["LlamaInferencePolicy" if policy is None or isinstance(policy, LlamaPolicy) else _name(policy)]
        assert type(model.model.layers[0].self_attn).__name__ == "NoPaddingLlamaAttention"
        assert model.lm_head.weight is model.model.embed_tokens.weight
        engine = shardformer.attach(model)
        output = engine.generate([PROMPT], SamplingParams(max_new_tokens=4, ignore_eos=True))[0]
        assert list(output.token_ids) == expected
        assert "self_attn" in repr(model)  # B6: printing a model of ColossalAI's with GQA failed


def _name(policy: object) -> str:
    return type(policy).__name__


def test_a_model_can_be_restored():
    native = tiny_model("gqa")
    expected = hf_greedy(native, PROMPT, 4)
    with ColossalInferenceShardformer(ALONE, SMALL) as shardformer:
        with shardformer.sharded_model(native) as model:
            assert type(model.model.norm).__name__ == "RMSNorm"
        assert type(native.model.norm).__name__ == "LlamaRMSNorm"
        assert hf_greedy(native, PROMPT, 4) == expected


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"extra_kwargs": {"model_shard_infer_config": 1}}, "extra_kwargs"),
        ({"fp8_communication": True}, "fp8_communication"),
        ({"enable_sequence_parallelism": True, "sequence_parallelism_mode": "all_to_all"}, "sequence"),
        ({"pipeline_stage_manager": object()}, "pipeline_stage_manager"),
    ],
)
def test_a_shard_config_that_asks_for_more_is_refused_by_name(monkeypatch, fields, name):
    monkeypatch.setattr("torch.distributed.get_world_size", lambda group=None: 1)
    with pytest.raises(ConfigError, match=name):
        ColossalInferenceShardformer(ColossalShardConfig(enable_tensor_parallelism=False, **fields))


def test_a_shard_config_of_nobodys_is_refused():
    with pytest.raises(ConfigError, match="is a dict"):
        ColossalInferenceShardformer({"tensor_parallel_size": 2})
    with pytest.raises(ConfigError, match="which names one itself"):
        ColossalInferenceShardformer(ALONE, process_group=object())


class Unplanned(nn.Module):
    """A module that no model here holds."""


class MissingClass(LlamaInferencePolicy):
    """Describes a class that the model has not: ColossalAI skipped it without a word (B27)."""

    def module_policy(self):
        return {**super().module_policy(), Unplanned: ModulePolicyDescription(attribute_replacement={"x": 1})}


class WithoutMetadata(nn.Module):
    """An attention layer of a user's own that has no place for the packed batch."""

    @staticmethod
    def from_native_module(module, process_group=None, **kwargs):
        return WithoutMetadata()

    def forward(self, hidden_states, **kwargs):
        return hidden_states, None


class OwnAttention(LlamaInferencePolicy):
    """Puts it in place of ours."""

    def module_policy(self):
        from inference_shardformer.bridges.colossalai.upstream import SubModuleReplacementDescription

        own = SubModuleReplacementDescription("self_attn", WithoutMetadata)
        return self.append_or_create_submodule_replacement(own, super().module_policy(), "LlamaDecoderLayer")


@pytest.mark.parametrize(
    ("policy", "match"),
    [(MissingClass(), "no module of exactly this class"), (OwnAttention(), "attn_metadata")],
)
def test_a_policy_that_cannot_serve_is_refused_and_the_model_restored(policy, match):
    native = tiny_model("gqa")
    before = [type(module) for module in native.modules()]
    with ColossalInferenceShardformer(ALONE, SMALL) as shardformer:
        with pytest.raises(PolicyError, match=match):
            shardformer.optimize(native, policy)
        assert [type(module) for module in native.modules()] == before


def test_a_checkpoint_is_read_in_slices_with_a_policy_that_only_places_ours(tmp_path):
    native = save_tiny_model("gqa", tmp_path)
    with ColossalInferenceShardformer(ALONE, SMALL) as shardformer:
        with pytest.raises(PolicyError, match="OwnAttention makes modules of its own"):
            shardformer.from_pretrained(tmp_path, policy=OwnAttention())
        engine = shardformer.attach(shardformer.from_pretrained(tmp_path, policy=LlamaInferencePolicy()))
        output = engine.generate([PROMPT], SamplingParams(max_new_tokens=4, ignore_eos=True))[0]
        assert list(output.token_ids) == hf_greedy(native, PROMPT, 4)
        assert shardformer.sharded.bytes_read > 0


def test_the_engine_of_scripts_takes_a_policy_of_the_bridge():
    config = Scripts(dtype="fp32", max_input_len=40, max_output_len=4)
    with InferenceEngine(tiny_model("gqa"), None, config, model_policy=LlamaInferencePolicy) as engine:
        assert isinstance(engine.shardformer, ColossalInferenceShardformer)
        _, ids = engine.generate(prompts_token_ids=[PROMPT], return_token_ids=True)
        assert ids == [hf_greedy(tiny_model("gqa"), PROMPT, 4)]


def test_our_policy_says_that_it_needs_us():
    with pytest.raises(StateError, match="does not serve ColossalAI's ShardFormer alone"):
        ShardFormer(ALONE).optimize(tiny_model("gqa"), LlamaInferencePolicy())


def test_the_accelerator_is_mended_for_a_while():
    before = (CpuAccelerator.get_rng_state, CpuAccelerator.manual_seed)
    assert cpu_defects(CpuAccelerator()) == ("get_rng_state", "manual_seed")

    def fail_meanwhile():
        with mended_cpu_accelerator(CpuAccelerator) as broken:
            assert broken == ("get_rng_state", "manual_seed")
            assert cpu_defects(CpuAccelerator()) == ()
            raise KeyError("whatever happens")

    with pytest.raises(KeyError):
        fail_meanwhile()
    assert (CpuAccelerator.get_rng_state, CpuAccelerator.manual_seed) == before


@pytest.mark.parametrize("value", ["8", None])
def test_the_environment_is_put_back(monkeypatch, value):
    name = "CUDA_DEVICE_MAX_CONNECTIONS"
    monkeypatch.delenv(name, raising=False)
    if value is not None:
        monkeypatch.setenv(name, value)
    with unchanged_environment():
        os.environ[name] = "1"
    assert os.environ.get(name) == value


def test_importing_the_bridge_leaves_no_trace():
    script = (
        "import os, sys, logging\n"
        "os.environ.pop('CUDA_DEVICE_MAX_CONNECTIONS', None)\n"
        "from inference_shardformer.bridges.colossalai import ColossalInferenceShardformer\n"
        "assert 'colossalai' in sys.modules\n"
        "assert 'CUDA_DEVICE_MAX_CONNECTIONS' not in os.environ\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd="/")
    assert done.returncode == 0, done.stderr


def test_the_core_does_not_import_the_bridge():
    """But for `doctor`, which asks what is installed; and that imports nothing of ColossalAI."""
    package = ROOT / "inference_shardformer"
    for path in [*package.rglob("*.py"), *(ROOT / "policies").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]:
        if path.is_relative_to(package / "bridges"):
            continue
        names = [
            node.module
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("inference_shardformer.bridges")
        ]
        assert set(names) <= {"inference_shardformer.bridges.colossalai.status"}, path
    script = "import sys, inference_shardformer.doctor.collect\nsys.exit('colossalai' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd="/")
    assert done.returncode == 0, done.stderr


def test_doctor_tells_of_colossalai():
    def absent(name):
        raise PackageNotFoundError(name)

    assert bridge_status(absent) is None
    here = bridge_status()
    assert here is not None
    assert (here.version, here.missing, here.mended, here.remedy) == (VERSION, (), MENDED, "")
    other = bridge_status(lambda name: "0.6.0")
    assert other is not None
    assert other.mended == ()
    assert other.remedy.startswith("pip install --no-deps colossalai==0.5.0")


def test_the_scripts_install_what_the_bridge_imports():
    script = (ROOT / "scripts" / "lib_venv.sh").read_text()
    constraints = (ROOT / "constraints.txt").read_text()
    assert f"BRIDGE=(colossalai {' '.join(IMPORTED)})" in script
    assert all(f"\n{name}==" in constraints for name in IMPORTED)
    assert f"\ncolossalai=={VERSION}\n" in constraints
