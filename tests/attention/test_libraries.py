"""The adapters of attention libraries pass the kit over stand-ins that check every argument as the libraries do."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from attention_standins import flash_attn4_module, flash_attn_module, on_cpu, varlen_module
from flashinfer_standin import flashinfer_module

from inference_shardformer.attention.base import AttentionMetadata
from inference_shardformer.attention.flash_attn import FlashAttnAttention, FlashAttnOptions
from inference_shardformer.attention.flash_attn4 import FlashAttn4Attention
from inference_shardformer.attention.flashinfer import FlashInferAttention, FlashInferOptions
from inference_shardformer.attention.varlen import VarlenAttention
from inference_shardformer.conformance import run_suite
from inference_shardformer.conformance.problem import make_problem
from inference_shardformer.conformance.samples import main_case
from inference_shardformer.probing.facts import CpuFacts, DeviceFacts, HostFacts

BACKENDS = {
    "varlen": on_cpu(VarlenAttention, "torch.nn.attention.varlen", varlen_module),
    "flash_attn": on_cpu(FlashAttnAttention, "flash_attn", flash_attn_module),
    "flash_attn4": on_cpu(FlashAttn4Attention, "flash_attn.cute.interface", flash_attn4_module),
    "flashinfer": on_cpu(FlashInferAttention, "flashinfer", flashinfer_module),
}
by_name = pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)


@by_name
def test_the_kit(backend) -> None:
    result = run_suite(backend)
    assert result.failures == {}
    passed = {outcome.check for outcome in result.outcomes if outcome.status == "passed"}
    assert {"named_batches", "graphs", "takes_views", "declared_combinations", "ignores_stale_slots"} <= passed


@by_name
def test_the_plan_of_another_backend_is_refused(backend) -> None:
    problem = make_problem(main_case(backend.capabilities))
    built = backend(problem.spec)
    foreign = AttentionMetadata(problem.batch, problem.kv_cache)
    with pytest.raises(TypeError, match=f"backend {backend.name} was given AttentionMetadata"):
        built.attend(problem.layers[0].q, problem.kv_cache.layer(0), foreign)
    with pytest.raises(TypeError, match=f"backend {backend.name} was given AttentionMetadata"):
        built.replan(problem.batch, foreign)


def test_flashinfer_refuses_the_plan_of_an_earlier_step() -> None:
    backend = BACKENDS["flashinfer"]
    problem = make_problem(main_case(backend.capabilities))
    built = backend(problem.spec)
    earlier = built.plan(problem.batch, problem.kv_cache)
    built.plan(problem.batch, problem.kv_cache)
    with pytest.raises(TypeError, match="the plan of an earlier step"):
        built.attend(problem.layers[0].q, problem.kv_cache.layer(0), earlier)


@by_name
def test_planning_never_waits_for_a_device(backend, monkeypatch) -> None:
    """The libraries are told lengths that the host knows; a tensor that is read back would stop the step."""
    problem = make_problem(main_case(backend.capabilities))
    built = backend(problem.spec)

    def waits(*_args: object) -> None:
        raise AssertionError("plan() read a tensor of the device")

    if backend.name == "flashinfer":  # its stand-in reads what lies on the host anyway
        tensors = (problem.batch.seq_lens, problem.batch.block_tables, problem.batch.cu_seqlens_q)
        addresses = {tensor.data_ptr() for tensor in tensors}
        read = torch.Tensor.tolist
        monkeypatch.setattr(torch.Tensor, "tolist", lambda t: waits() if t.data_ptr() in addresses else read(t))
    else:
        for name in ("item", "tolist", "cpu", "__int__", "__bool__", "__index__"):
            monkeypatch.setattr(torch.Tensor, name, waits)
    built.plan(problem.batch, problem.kv_cache)


@pytest.mark.parametrize(
    ("name", "options", "argument", "value"),
    [
        ("flash_attn", FlashAttnOptions(num_splits=1), "num_splits", 1),
        ("flash_attn", FlashAttnOptions(), "num_splits", 0),
        ("flashinfer", FlashInferOptions(split_kv=False), "disable_split_kv", True),
        ("flashinfer", FlashInferOptions(), "disable_split_kv", False),
    ],
)
def test_whether_contexts_are_split_is_an_option(name, options, argument, value) -> None:
    backend = BACKENDS[name]
    problem = make_problem(replace(main_case(backend.capabilities), sequences=((20, 1), (7, 1))))
    built, seen = backend(problem.spec, options), {}
    target, method = (built, "_with_kvcache") if name == "flash_attn" else (built._decodes, "plan")
    real = getattr(target, method)
    setattr(target, method, lambda *args, **given: (seen.update(given), real(*args, **given))[1])
    problem.step(built)
    assert seen[argument] == value


@pytest.mark.parametrize(
    ("name", "block_size", "code"),
    [
        ("flash_attn", 16, "block_size"),
        ("flash_attn", 512, None),
        ("varlen", 128, "block_size"),
        ("flash_attn4", 128, "block_size"),
        ("flash_attn4", 16, None),
        ("flashinfer", 17, None),
    ],
)
def test_known_limits_are_verdicts(name, block_size, code) -> None:
    backend = BACKENDS[name]
    spec = replace(main_case(backend.capabilities), block_size=block_size).spec(torch.device("cpu"))
    assert [reason.code for reason in backend.reasons(spec)] == ([code] if code else [])


def test_sinks_beside_a_softcap_are_refused() -> None:
    backend = BACKENDS["flash_attn4"]
    spec = replace(main_case(backend.capabilities), softcap=30.0, sinks=True).spec(torch.device("cpu"))
    (reason,) = backend.reasons(spec)
    assert reason.code == "sinks_with_softcap"


@by_name
def test_the_library_is_imported_when_the_backend_is_built(backend) -> None:
    (requirement,) = backend.requires
    assert requirement.remedy
    real = backend.__mro__[1]
    if requirement.module.startswith("torch"):
        return
    assert requirement.module not in sys.modules
    with pytest.raises(ModuleNotFoundError):
        real(main_case(backend.capabilities).spec(torch.device("cpu")))


@pytest.mark.parametrize(("capability", "is_refused"), [((9, 0), False), ((10, 3), False), ((12, 0), True)])
def test_flash_attn4_has_no_paged_cache_on_the_newest_desktops(capability, is_refused) -> None:
    (requirement,) = FlashAttn4Attention.requires
    host = HostFacts(CpuFacts("x86_64", "any"), (DeviceFacts("cuda", "a card", capability),))
    problem = requirement.hardware_problem(host, host.accelerators[0])
    assert (problem is not None) == is_refused
