"""Selecting compute kernels: a function of facts, with a reason for every candidate that cannot serve."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType, SimpleNamespace
from typing import ClassVar

import pytest
import torch

from inference_shardformer.attention.spec import Reason
from inference_shardformer.compute import cpu_linear
from inference_shardformer.compute.base import ComputeCapabilities, ComputeKind, ComputeSpec
from inference_shardformer.compute.cpu_linear import CpuLinear, compresses
from inference_shardformer.compute.registry import contract_problem, make_registries
from inference_shardformer.compute.selection import KernelSurvey, make_kernel_survey, select_kernel
from inference_shardformer.compute.torch_kernels import TorchLinear, TorchNorm
from inference_shardformer.errors import BackendUnavailableError, PluginError

SPEC = ComputeSpec(torch.device("cpu"), torch.bfloat16, 64, 128, activation="silu")
NOT_BUILT = Reason("native_missing", "the native CPU kernels were never built", "build them")


class NativeLike(TorchLinear):
    name: ClassVar[str] = "cpu"
    capabilities: ClassVar[ComputeCapabilities] = ComputeCapabilities(
        devices=("cpu",),
        dtypes=(torch.bfloat16,),
        quantizations=("int8",),
        compressions=("lossless",),
        needs_native=True,
    )
    fused_activations: ClassVar[frozenset[str]] = frozenset({"silu"})


def survey(native: Reason | None = None, *, broken: bool = False) -> KernelSurvey:
    registries = dict(make_registries())
    linear = make_registries()[ComputeKind.LINEAR]
    known = {name: linear.get(name) for name in linear.names() if name != "cpu"}
    fresh = type(linear)("linear kernel")
    for name, kernel in known.items():
        fresh.register(name, kernel)
    fresh.register("cpu", NativeLike)
    if broken:
        fresh.register("broken", "no_such_module_anywhere:Kernel")
    registries[ComputeKind.LINEAR] = fresh
    return make_kernel_survey(native, MappingProxyType(registries))


def test_auto_prefers_the_native_kernel_and_says_why_not_where_it_is_missing() -> None:
    assert select_kernel(ComputeKind.LINEAR, SPEC, "auto", survey()).name == "cpu"
    chosen = select_kernel(ComputeKind.LINEAR, SPEC, "auto", survey(NOT_BUILT))
    assert chosen.name == "torch"
    assert chosen.verdicts[0].name == "cpu"
    assert chosen.verdicts[0].reasons == (NOT_BUILT,)


def test_a_named_kernel_is_used_or_refused() -> None:
    assert select_kernel(ComputeKind.LINEAR, SPEC, "torch", survey()).name == "torch"
    with pytest.raises(BackendUnavailableError, match="never built"):
        select_kernel(ComputeKind.LINEAR, SPEC, "cpu", survey(NOT_BUILT))
    with pytest.raises(BackendUnavailableError, match="did you mean 'torch'"):
        select_kernel(ComputeKind.LINEAR, SPEC, "troch", survey())


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"device": torch.device("cuda")}, "device"),
        ({"dtype": torch.float16}, "dtype"),
    ],
)
def test_declared_facts_become_reasons(changes: dict[str, object], code: str) -> None:
    chosen = select_kernel(ComputeKind.LINEAR, replace(SPEC, **changes), "auto", survey())
    refused = next(verdict for verdict in chosen.verdicts if verdict.name == "cpu")
    assert [reason.code for reason in refused.reasons] == [code]
    assert chosen.name == "torch"


def test_quantised_weights_are_refused_by_name_where_no_kernel_takes_them() -> None:
    spec = replace(SPEC, quantization="int8")
    assert select_kernel(ComputeKind.LINEAR, spec, "auto", survey()).name == "cpu"
    with pytest.raises(BackendUnavailableError, match="does not take weights in int8"):
        select_kernel(ComputeKind.LINEAR, spec, "torch", survey())
    with pytest.raises(BackendUnavailableError, match=r"int8.*quantization"):
        select_kernel(ComputeKind.LINEAR, spec, "auto", survey(NOT_BUILT))


def test_compressed_weights_are_refused_by_name_where_no_kernel_has_them() -> None:
    for asked in ("auto", "none", "lossless"):
        assert select_kernel(ComputeKind.LINEAR, replace(SPEC, compression=asked), "auto", survey()).name == "cpu"
    for asked in ("auto", "none"):
        assert select_kernel(ComputeKind.LINEAR, replace(SPEC, compression=asked), "torch", survey()).name == "torch"
    spec = replace(SPEC, compression="lossless")
    with pytest.raises(BackendUnavailableError, match=r"torch has no lossless compression of weights") as refused:
        select_kernel(ComputeKind.LINEAR, spec, "torch", survey())
    assert refused.value.remedy == "set inference.weights.compression=auto"
    with pytest.raises(BackendUnavailableError, match=r"never built.*torch has no lossless compression"):
        select_kernel(ComputeKind.LINEAR, spec, "auto", survey(NOT_BUILT))
    assert [reason.code for reason in TorchNorm.reasons(spec)] == []  # it is not about weights of linear layers


@pytest.mark.parametrize(
    ("changes", "message", "remedy"),
    [
        ({}, "", ""),
        ({"dtype": torch.float32}, "weights in float32 are not compressed", "set inference.dtype=bf16"),
        ({"quantization": "int8"}, "weights in int8 are not compressed", "or inference.weights.quantization"),
        ({"hidden_size": (1 << 18) + 1}, "a weight of 262145 columns is not compressed", "compression unset"),
    ],
)
def test_what_the_native_kernel_compresses(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, object], message: str, remedy: str
) -> None:
    monkeypatch.setattr(cpu_linear, "native_problem", lambda: None)
    monkeypatch.setattr(cpu_linear, "compression_gains", lambda: True)
    spec = replace(SPEC, **changes)
    found = CpuLinear.reasons(replace(spec, compression="lossless"))
    assert [reason.code for reason in found] == (["compression"] if message else [])
    for asked, value in (("auto", "none" if message else "lossless"), ("none", "none")):
        given = replace(spec, compression=asked)
        assert CpuLinear.reasons(given) == []
        assert CpuLinear.compression(given).value == value
        assert compresses(given, given.dtype, given.hidden_size) == (value == "lossless")
    told = CpuLinear.compression(spec).reason
    if message:
        assert found[0].message == told
        assert told.startswith(message)
        assert remedy in found[0].remedy
    else:
        assert "12 bits" in told
    assert not compresses(spec, torch.int8)
    assert CpuLinear.compression(replace(spec, compression="none")).reason == "as asked"


def test_a_level_that_gains_nothing_compresses_only_what_it_is_asked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_linear, "native_problem", lambda: None)
    monkeypatch.setattr(cpu_linear, "native", lambda: SimpleNamespace(isa_level="avx2"))
    monkeypatch.setattr(cpu_linear, "compression_gains", lambda: False)
    auto, asked = SPEC, replace(SPEC, compression="lossless")
    told = CpuLinear.compression(auto)
    assert told == ("none", "the instruction-set level avx2 gains nothing by compressed weights")
    assert CpuLinear.compression(asked).value == "lossless"
    assert CpuLinear.reasons(auto) == CpuLinear.reasons(asked) == []
    assert (compresses(auto, auto.dtype), compresses(asked, asked.dtype)) == (False, True)


def test_without_native_kernels_compression_is_no_second_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_linear, "native_problem", lambda: NOT_BUILT)
    assert CpuLinear.reasons(replace(SPEC, compression="lossless")) == []
    on_cuda = CpuLinear.reasons(replace(SPEC, device=torch.device("cuda"), compression="lossless", quantization="int8"))
    assert [reason.code for reason in on_cuda] == ["device"]


def test_fusion_needs_a_linear_kernel_that_fuses_the_activation() -> None:
    seen, fusing = survey(), replace(SPEC, chosen={"linear": "cpu"}, fused_activations=frozenset({"silu"}))
    plain = replace(SPEC, chosen={"linear": "torch"})
    assert select_kernel(ComputeKind.ACTIVATION, fusing, "auto", seen).name == "fused"
    assert select_kernel(ComputeKind.ACTIVATION, plain, "auto", seen).name == "torch"
    assert select_kernel(ComputeKind.ACTIVATION, replace(fusing, activation="gelu"), "auto", seen).name == "torch"
    with pytest.raises(BackendUnavailableError, match="'torch' does not fuse the activation silu"):
        select_kernel(ComputeKind.ACTIVATION, plain, "fused", seen)


def test_a_plug_in_that_does_not_load_is_a_verdict_until_it_is_named() -> None:
    seen = survey(broken=True)
    chosen = select_kernel(ComputeKind.LINEAR, SPEC, "auto", seen)
    assert {verdict.name: bool(verdict.reasons) for verdict in chosen.verdicts}["broken"]
    with pytest.raises(PluginError, match="no_such_module_anywhere"):
        select_kernel(ComputeKind.LINEAR, SPEC, "broken", seen)


def test_the_contract_is_checked() -> None:
    class Undeclared(TorchNorm):
        contract_version = 99

    assert "not a subclass of LinearKernel" in str(contract_problem(ComputeKind.LINEAR, TorchNorm))
    assert "contract 99" in str(contract_problem(ComputeKind.NORM, Undeclared))
    assert contract_problem(ComputeKind.NORM, TorchNorm) is None
