"""Rotary kernels: what they are bound to, what keeps its own write, and that every way gives the same tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from family_models import IS_OLD, family_model, greedy
from tiny_models import ragged_prompts

from inference_shardformer import InferenceConfig, InferenceShardformer, SamplingParams, ShardConfig
from inference_shardformer.attention.base import AttentionBackend, AttentionSpec, KVLayout, stores_by_slot
from inference_shardformer.attention.cpu import CpuAttention
from inference_shardformer.attention.flash_attn import FlashAttnAttention
from inference_shardformer.attention.sdpa import SdpaAttention
from inference_shardformer.attention.slot_writes import is_stored_by_slot
from inference_shardformer.attention.triton import TritonAttention
from inference_shardformer.compute.base import ComputeCapabilities, ComputeSpec
from inference_shardformer.compute.cpu_rotary_write import CpuRotaryWrite
from inference_shardformer.compute.proof_of_fused import prove_rotary_write
from inference_shardformer.compute.rotary_write import FusedRotaryWrite
from inference_shardformer.compute.torch_kernels import TorchRotaryWrite
from inference_shardformer.compute.triton_rotary_write import TritonRotaryWrite
from inference_shardformer.errors import BackendUnavailableError
from inference_shardformer.kernels import reference
from inference_shardformer.kernels.cpu.library import native_problem
from inference_shardformer.kv_cache.cache import LayerKVCache
from inference_shardformer.modeling.nopadding_attention import NoPaddingRotaryAttention

CPU = torch.device("cpu")
SPEC = ComputeSpec(CPU, torch.float32, 64, 128, rotary="halves", head_dim=16, chosen={"attention": "sdpa"})
ATTENTION = AttentionSpec(4, 2, 16, 0.25, torch.float32, CPU, 4)
needs_native = pytest.mark.skipif(native_problem() is not None, reason="there are no native kernels here")


class OwnWrite(SdpaAttention):
    """Writes in a way of its own."""

    def write(self, k, v, cache, meta):
        super().write(k, v, cache, meta)


class SaysSo(OwnWrite):
    """The same, and says that it is the usual way."""

    @stores_by_slot
    def write(self, k, v, cache, meta):
        super().write(k, v, cache, meta)


class Reference(FusedRotaryWrite):
    """The twin as a kernel."""

    name: ClassVar[str] = "twin"
    contract_version: ClassVar[int] = 1
    capabilities: ClassVar[ComputeCapabilities] = ComputeCapabilities(devices=("cpu",))
    defect: ClassVar[str] = ""

    def rotate_and_write(
        self,
        heads: torch.Tensor,
        cache: LayerKVCache,
        slot_mapping: torch.Tensor,
        *,
        cos: torch.Tensor,
        sin: torch.Tensor,
        layout: KVLayout,
    ) -> torch.Tensor:
        given = {"cos": cos, "sin": -sin if self.defect == "direction" else sin}
        slots = slot_mapping.roll(1) if self.defect == "slots" else slot_mapping
        order = "HND" if layout is KVLayout.HND and self.defect != "layout" else "NHD"
        keys, values = reversed(cache) if self.defect == "exchanged" else cache
        if self.defect == "partial":
            given = {name: each[:, :2] for name, each in given.items()}
        return reference.rotary_and_write_kv(heads.flatten(1), keys, values, slots, **given, layout=order)


def test_the_mark_is_lost_by_a_write_of_ones_own():
    assert all(map(is_stored_by_slot, (AttentionBackend, SdpaAttention, CpuAttention, TritonAttention)))
    assert is_stored_by_slot(FlashAttnAttention)  # the usual write
    assert not is_stored_by_slot(OwnWrite)
    assert is_stored_by_slot(SaysSo)
    assert is_stored_by_slot(SdpaAttention(ATTENTION))
    assert not is_stored_by_slot(object())


def test_it_is_bound_to_backends_that_store_by_slot_in_a_type_it_knows():
    kernel = Reference(SPEC)
    assert kernel.bind(SdpaAttention(ATTENTION)) is not None
    assert kernel.bind(OwnWrite(ATTENTION)) is None
    assert kernel.bind(SdpaAttention(replace(ATTENTION, kv_dtype=torch.float8_e4m3fn))) is None
    assert TorchRotaryWrite(SPEC).bind(SdpaAttention(ATTENTION)) is None


def _codes(**changes: object) -> list[str]:
    return [reason.code for reason in TritonRotaryWrite.reasons(replace(SPEC, device=torch.device("cuda"), **changes))]


def test_verdicts():
    assert _codes() == []
    assert _codes(rotary="") == ["rotary"]
    assert _codes(own_writes=("mine",)) == ["own_write"]
    assert _codes(kv_dtype=torch.float8_e4m3fn) == []
    assert _codes(kv_dtype=torch.int8) == ["kv_dtype"]
    assert [reason.code for reason in CpuRotaryWrite.reasons(replace(SPEC, kv_dtype=torch.float8_e4m3fn))] == [
        "kv_dtype"
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_twin_passes_its_proof_and_torch_has_none(dtype):
    spec = replace(SPEC, dtype=dtype)
    prove_rotary_write(Reference(spec), spec)
    prove_rotary_write(TorchRotaryWrite(spec), spec)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_native_kernel_passes_its_proof(dtype):
    spec = replace(SPEC, dtype=dtype)
    prove_rotary_write(CpuRotaryWrite(spec), spec)


@pytest.mark.parametrize("defect", ["direction", "slots", "layout", "exchanged", "partial"])
def test_the_proof_catches(defect):
    wrong = type("Wrong", (Reference,), {"defect": defect})(SPEC)
    with pytest.raises(BackendUnavailableError, match=r"rotary_write kernel 'twin' (differs|failed its proof run)"):
        prove_rotary_write(wrong, SPEC)


@needs_native
@pytest.mark.parametrize("case", ["qwen3", "phi3_partial_window", "gpt_neox"])
def test_both_ways_and_a_switch_between_layouts_give_hugging_faces_tokens(case):
    model = family_model(case)
    prompts = ragged_prompts(4, model.config.vocab_size)
    expected = [greedy(model, prompt, 6) for prompt in prompts]
    settings = {"dtype": "fp32", "attention": {"backend": "sdpa"}, "kernels": {"rotary_write": "cpu"}}
    with InferenceShardformer(ShardConfig(device="cpu"), InferenceConfig.model_validate(settings)) as shardformer:
        sharded, _ = shardformer.optimize(model)
        engine = shardformer.attach(sharded)
        (first, *_) = (each for each in sharded.modules() if isinstance(each, NoPaddingRotaryAttention))
        for name in ("sdpa", "cpu"):
            if engine.config["inference.attention.backend"] != name:
                engine.switch_backend(name)
            assert f"backend={name}" in repr(first)
            assert "rotary=cpu" in repr(first)
            outputs = engine.generate(prompts, SamplingParams(max_new_tokens=6, ignore_eos=True))
            assert [list(output.token_ids) for output in outputs] == expected
        usual = first.backend
        first.backend = OwnWrite(usual.spec)
        assert "rotary=torch" in repr(first)
        first.backend = usual
        assert "rotary=cpu" in repr(first)


@needs_native
@pytest.mark.skipif(IS_OLD, reason="this transformers' OPT is refused")
def test_a_model_without_rotary_refuses_it_by_name_and_auto_leaves_it_out():
    config = {"dtype": "fp32", "kernels": {"rotary_write": "cpu"}}
    with (
        InferenceShardformer(ShardConfig(device="cpu"), InferenceConfig.model_validate(config)) as shardformer,
        pytest.raises(BackendUnavailableError, match="turns the halves"),
    ):
        shardformer.optimize(family_model("opt"))
    with InferenceShardformer(ShardConfig(device="cpu"), InferenceConfig(dtype="fp32")) as shardformer:
        shardformer.optimize(family_model("opt"))
        told = shardformer.explain().to_json()["kernels"]["rotary_write"]
    assert told["chosen"] == "torch"
    (cpu,) = (each for each in told["candidates"] if each["name"] == "cpu")
    assert [reason["code"] for reason in cpu["reasons"]] == ["rotary"]
