"""When the Triton norm and activation kernels are chosen, and why not; no device and no Triton needed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from inference_shardformer.compute import selection
from inference_shardformer.compute.base import ComputeKind, ComputeSpec
from inference_shardformer.compute.fused_add_layer import FusedAddLayer
from inference_shardformer.compute.selection import KernelSurvey, make_kernel_survey, select_kernel
from inference_shardformer.compute.triton_activation import TritonActivation
from inference_shardformer.compute.triton_experts import TritonExperts
from inference_shardformer.compute.triton_norm import TritonNorm
from inference_shardformer.probing.facts import CpuFacts, DeviceFacts, HostFacts
from inference_shardformer.probing.requirement import ProbeResult

CUDA = torch.device("cuda")
SPEC = ComputeSpec(CUDA, torch.bfloat16, 4096, 14336, activation="silu")
A100 = DeviceFacts("cuda", "NVIDIA A100", (8, 0))
T4 = DeviceFacts("cuda", "Tesla T4", (7, 5))


@pytest.fixture
def survey_of(monkeypatch):
    """A survey of a machine with one card, where every library that is probed works."""
    probed = []

    def probe_all(requirements):
        probed.extend(wanted := list(requirements))
        return {each: ProbeResult(each.module, "ok", "3.9") for each in wanted}

    def make(card: DeviceFacts, device: torch.device = CUDA) -> KernelSurvey:
        probed.clear()
        host = HostFacts(CpuFacts("x86_64", "any"), (card,))
        monkeypatch.setattr(selection, "collect_facts", lambda **_: host)
        return make_kernel_survey(None, device=device)

    monkeypatch.setattr(selection, "probe_all", probe_all)
    make.probed = probed
    return make


def test_auto_takes_them_on_cuda(survey_of):
    survey = survey_of(A100)
    assert select_kernel(ComputeKind.NORM, SPEC, "auto", survey).name == "triton"
    assert select_kernel(ComputeKind.ACTIVATION, SPEC, "auto", survey).name == "triton"
    fused = replace(SPEC, fused_activations=frozenset({"silu"}))
    assert select_kernel(ComputeKind.ACTIVATION, fused, "auto", survey).name == "fused"


def test_auto_takes_those_of_layers_experts_and_tokens(survey_of):
    survey = survey_of(A100)
    llama = replace(SPEC, layer_shape="llama", rotary="halves", chosen={"linear": "torch", "norm": "triton"})
    assert select_kernel(ComputeKind.ROTARY_WRITE, llama, "auto", survey).name == "triton"
    assert select_kernel(ComputeKind.SAMPLING, llama, "auto", survey).name == "triton"
    assert select_kernel(ComputeKind.EXPERTS, llama, "auto", survey).name == "torch"
    assert select_kernel(ComputeKind.EXPERTS, replace(llama, has_experts=True), "auto", survey).name == "triton"
    assert select_kernel(ComputeKind.DECODER_LAYER, llama, "auto", survey).name == "modules"
    assert select_kernel(ComputeKind.DECODER_LAYER, replace(llama, norm_adds=True), "auto", survey).name == "fused_add"


def test_why_a_layer_and_experts_are_left_to_their_modules():
    codes = [reason.code for reason in FusedAddLayer.reasons(SPEC)]
    assert codes == ["layer_shape", "norm"]
    assert FusedAddLayer.reasons(replace(SPEC, layer_shape="llama", norm_adds=True)) == []
    packed = replace(SPEC, chosen={"linear": "fp8"}, has_experts=True)
    assert [reason.code for reason in TritonExperts.reasons(packed)] == ["linear"]
    assert [reason.code for reason in TritonExperts.reasons(SPEC)] == ["experts", "linear"]


def test_an_old_card_and_a_cpu_are_refused_and_nothing_is_probed_for_them(survey_of):
    found = select_kernel(ComputeKind.NORM, SPEC, "auto", survey_of(T4))
    assert found.name == "torch"
    assert not survey_of.probed
    codes = {verdict.name: [reason.code for reason in verdict.reasons] for verdict in found.verdicts}
    assert codes["triton"] == ["wrong_device"]
    cpu = torch.device("cpu")
    survey = survey_of(A100, cpu)
    assert not survey_of.probed
    verdicts = select_kernel(ComputeKind.NORM, replace(SPEC, device=cpu), "auto", survey).verdicts
    assert [reason.code for each in verdicts if each.name == "triton" for reason in each.reasons] == ["device"]


def test_what_there_is_no_kernel_for():
    assert not TritonNorm.reasons(SPEC)
    assert not TritonActivation.reasons(replace(SPEC, activation="gelu_pytorch_tanh"))
    (wide,) = TritonNorm.reasons(replace(SPEC, hidden_size=40000))
    assert (wide.code, "40000" in wide.message) == ("hidden_size", True)
    (other,) = TritonActivation.reasons(replace(SPEC, activation="gelu"))
    assert (other.code, "gelu is not among" in other.message) == ("activation", True)
