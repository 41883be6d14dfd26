"""fp8 weights: the products beside float64, what torch is given, what is stored, and who is refused."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import scaled_mm_standin
import torch
from scaled_mm_standin import scaled_mm
from torch.utils._python_dispatch import TorchDispatchMode

from inference_shardformer.compute import fp8_linear
from inference_shardformer.compute.base import ComputeKind, ComputeSpec
from inference_shardformer.compute.fp8_linear import Fp8Linear, Fp8Weight, multiplies_on_cpu, scales_rows_itself
from inference_shardformer.compute.linear import LinearShape
from inference_shardformer.compute.proof import prove
from inference_shardformer.compute.registry import make_registries
from inference_shardformer.compute.selection import KernelSurvey, make_kernel_survey, select_kernel
from inference_shardformer.compute.torch_kernels import PlainWeight, TorchActivation, TorchNorm
from inference_shardformer.errors import BackendUnavailableError
from inference_shardformer.kernels import reference
from inference_shardformer.kernels.scaled_mm import multiply_scaling_rows, multiply_then_scale, quantize_rows
from inference_shardformer.probing.facts import CpuFacts, DeviceFacts, HostFacts
from inference_shardformer.probing.requirement import ProbeResult

CPU, BF16 = torch.device("cpu"), torch.bfloat16
SPEC = ComputeSpec(CPU, BF16, 64, 128, activation="silu", quantization="fp8")
PRODUCTS = {"rows": multiply_scaling_rows, "afterwards": partial(multiply_then_scale, one=torch.ones(()))}
SHAPES = [(64, 48), (80, 16), (70, 37), (256, 130)]  # in, out; 16 divides neither of the last but one


@pytest.fixture
def standin(monkeypatch):
    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(BF16)


def made(plain: torch.Tensor, product=multiply_scaling_rows) -> Fp8Weight:
    out_features, in_features = plain.shape
    weight = Fp8Weight(LinearShape(in_features, out_features, BF16), product)
    weight.adopt(plain)
    return weight


def exact(x: torch.Tensor, plain: torch.Tensor) -> torch.Tensor:
    """The product of what both are rounded to, by the twins, in float64."""
    rounded = [reference.dequantize_e4m3(*reference.quantize_e4m3(each)).double() for each in (x, plain)]
    return rounded[0] @ rounded[1].T


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 17])
def test_it_gives_torch_what_it_takes_and_equals_float64(standin, product, shape, tokens) -> None:
    plain, bias = noise(shape[1], shape[0]), noise(shape[1], seed=1)
    x, residual = noise(tokens, shape[0], seed=2) * 3, noise(tokens, shape[1], seed=3)
    weight = made(plain, PRODUCTS[product])
    expected = exact(x, plain) + bias.double()
    out = weight.multiply(x, bias)
    assert (out.dtype, out.is_contiguous()) == (BF16, True)
    torch.testing.assert_close(out.double(), expected, rtol=2**-8, atol=1e-5)
    added = weight.multiply(x, bias, residual)
    torch.testing.assert_close(added.double(), expected + residual.double(), rtol=2**-7, atol=2**-5)
    assert torch.equal(weight.multiply_wide(x, bias), out.float())


def test_leading_axes_and_no_tokens(standin) -> None:
    weight, x = made(noise(48, 64)), noise(2, 3, 64, seed=1)
    assert torch.equal(weight.multiply(x), weight.multiply(x.view(6, 64)).view(2, 3, 48))
    assert weight.multiply(x[:0]).shape == (0, 3, 48)
    sliced = noise(6, 128, seed=2)[:, :64]  # rows that lie apart
    assert torch.equal(weight.multiply(sliced), weight.multiply(sliced.contiguous()))


@pytest.mark.skipif(not multiplies_on_cpu(), reason="this torch multiplies no e4m3 matrices on a CPU")
@pytest.mark.parametrize("product", PRODUCTS)
def test_torch_itself_agrees_with_the_stand_in(product, monkeypatch) -> None:
    plain, bias, x = noise(48, 64), noise(48, seed=1), noise(17, 64, seed=2)
    real = made(plain, PRODUCTS[product]).multiply(x, bias)
    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    torch.testing.assert_close(real, made(plain, PRODUCTS[product]).multiply(x, bias), rtol=2**-7, atol=1e-3)


def test_the_stand_in_refuses_what_cuda_refuses() -> None:
    codes, scales = quantize_rows(noise(3, 32), 32)
    weight, weight_scales = quantize_rows(noise(16, 32, seed=1), 32)
    good = (codes, weight.t(), scales, weight_scales.t())
    scaled_mm(*good, out_dtype=BF16)
    wrong = {
        "column-major": (codes, weight.t().contiguous(), *good[2:]),
        "row-major": (codes.t().contiguous().t(), *good[1:]),
        "16 divides": (codes, weight[:10].t(), scales, weight_scales[:10].t()),
        "each row": (codes, weight.t(), scales, weight_scales),
        "float32": (codes, weight.t(), scales.double(), weight_scales.t()),
        "at least one row": (codes[:0], weight.t(), scales[:0], weight_scales.t()),
    }
    for words, arguments in wrong.items():
        with pytest.raises(scaled_mm_standin.Refused, match=words):
            scaled_mm(*arguments, out_dtype=BF16)


@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16])
def test_rows_are_rounded_as_by_the_twin(dtype) -> None:
    x = (noise(9, 40).float() * torch.logspace(-4, 4, 9)[:, None]).to(dtype)
    x[4] = 0
    for mine, twin in zip(quantize_rows(x, 40), reference.quantize_e4m3(x), strict=True):
        assert torch.equal(mine.view(torch.uint8), twin.view(torch.uint8))
    codes, scales = quantize_rows(x, 40)
    assert codes.float().abs().amax(dim=1).tolist() == [448.0] * 4 + [0.0] + [448.0] * 4
    error = (reference.dequantize_e4m3(codes, scales) - x.float()).abs()
    assert (error <= x.float().abs() * 2**-4 + scales * 2**-10).all()  # three bits of mantissa; subnormal steps of 2^-9


def test_a_row_depends_on_itself_alone() -> None:
    x = noise(5, 32)
    x[1, 3], x[2, 0] = float("nan"), float("inf")
    whole = reference.dequantize_e4m3(*quantize_rows(x, 32))
    for row in (0, 3, 4):
        assert torch.equal(whole[row], reference.dequantize_e4m3(*quantize_rows(x[row : row + 1], 32))[0])
    assert whole[1].isnan().all()
    assert not whole[2].isfinite().all()


def test_a_weight_is_written_in_pieces_and_over_again() -> None:
    plain = noise(50, 72)
    whole, pieces = made(plain), made(torch.zeros(50, 72))
    addresses = [tensor.data_ptr() for tensor in pieces.tensors.values()]
    for row in range(0, 50, 16):
        pieces.write(plain[row : row + 16].float(), row=row)
    assert torch.equal(pieces.plain(), whole.plain())
    pieces.write(whole.plain())  # what was rounded before stays where it is
    assert torch.equal(pieces.tensors["weight"].view(torch.uint8), whole.tensors["weight"].view(torch.uint8))
    assert [tensor.data_ptr() for tensor in pieces.tensors.values()] == addresses
    for column in (0, 8):
        with pytest.raises(ValueError, match="not whole rows of 72, which share a scale"):
            pieces.write(plain[:, :64], column=column)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bytes_are_told_before(shape) -> None:
    kernel, linear = Fp8Linear(SPEC), LinearShape(*shape, BF16)
    weight = kernel.weight(linear)
    assert all(tensor.is_meta for tensor in weight.tensors.values())
    weight.allocate(CPU)
    assert sum(tensor.nbytes for tensor in weight.tensors.values()) == kernel.num_bytes(linear)
    table = kernel.weight(replace(linear, is_table=True))
    assert type(table) is PlainWeight
    assert kernel.num_bytes(table.shape) == 2 * shape[0] * shape[1]


def test_what_it_does_not_do_is_said() -> None:
    weight = made(noise(16, 16))
    with pytest.raises(NotImplementedError, match="fuses no activation"):
        weight.multiply_gated(noise(1, 16))
    with pytest.raises(NotImplementedError, match="table"):
        weight.rows(torch.tensor([0]))


class Waits(TorchDispatchMode):
    """Refuses what a device would be waited for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "equal", "masked_select"), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", PRODUCTS)
def test_nothing_waits_for_the_device(name, monkeypatch) -> None:
    def product(a, b, *, out_dtype, **_):
        return torch.zeros(len(a), b.shape[1], dtype=out_dtype)

    monkeypatch.setattr(torch, "_scaled_mm", product)
    weight, x, bias = made(noise(37, 70), PRODUCTS[name]), noise(2, 70, seed=1), noise(37, seed=2)
    with Waits():
        weight.multiply(x, bias)
        with pytest.raises(AssertionError, match="_local_scalar_dense"):
            x[0, 0].item()


@pytest.mark.parametrize(
    ("capability", "version", "itself"),
    [
        ((8, 9), "2.13.0", False),
        ((9, 0), "2.13.0+cu130", True),
        ((9, 0), "2.7.1", True),
        ((9, 0), "2.6.0+cu124", False),
        ((10, 0), "2.13.0", True),
        ((12, 0), "2.13.0", False),
    ],
)
def test_who_applies_the_scales(monkeypatch, capability, version, itself) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert scales_rows_itself(torch.device("cuda")) is itself
    assert scales_rows_itself(CPU)


@pytest.mark.parametrize("product", PRODUCTS)
def test_the_proof_passes_and_catches_scales_of_others(standin, monkeypatch, product) -> None:
    monkeypatch.setattr(fp8_linear, "_multiply_on", lambda device: PRODUCTS[product])
    others = TorchNorm(SPEC), TorchActivation(SPEC), SPEC
    prove(Fp8Linear(SPEC), *others)

    def wrong(codes, scales, weight, weight_scales, *, bias=None):
        return PRODUCTS[product](codes, scales.flip(0), weight, weight_scales.roll(1, 1), bias=bias)

    monkeypatch.setattr(fp8_linear, "_multiply_on", lambda device: wrong)
    with pytest.raises(BackendUnavailableError, match="linear kernel 'fp8' differs from the reference"):
        prove(Fp8Linear(SPEC), *others)

    def broken(*args, **kwargs):
        raise RuntimeError("Rowwise scaling is not currently supported on your device")

    monkeypatch.setattr(fp8_linear, "_multiply_on", lambda device: broken)
    with pytest.raises(BackendUnavailableError, match=r"'fp8' failed its proof run: RuntimeError: Rowwise"):
        prove(Fp8Linear(SPEC), *others)


H100 = DeviceFacts("cuda", "NVIDIA H100", (9, 0))
L40S = DeviceFacts("cuda", "NVIDIA L40S", (8, 9))
A100 = DeviceFacts("cuda", "NVIDIA A100", (8, 0))
MI300X = DeviceFacts("rocm", "AMD Instinct MI300X")


MISSING = ProbeResult("triton", "missing", "", "triton is not installed", "pip install triton")


def survey(*devices: DeviceFacts, has_triton: bool = True) -> KernelSurvey:
    seen = make_kernel_survey(None, make_registries(), device=CPU)
    probes = {each: ProbeResult(each.module, "ok") for each in Fp8Linear.requires} if has_triton else {}
    probes = {**dict.fromkeys(Fp8Linear.requires, MISSING), **probes}
    return replace(seen, probes=probes, host=HostFacts(CpuFacts("x86_64", "a CPU"), devices))


def on(device: DeviceFacts, asked: str = "auto", **changes: object):
    spec = replace(SPEC, device=torch.device("cuda"), **changes)
    return select_kernel(ComputeKind.LINEAR, spec, asked, survey(device))


@pytest.mark.parametrize("device", [H100, L40S], ids=lambda device: device.name)
def test_it_serves_where_it_was_asked_for_and_nowhere_else(device) -> None:
    assert on(device).name == "fp8"
    kept = on(device, quantization=None)
    assert kept.name == "torch"
    (verdict,) = (each for each in kept.verdicts if each.name == "fp8")
    assert [(reason.code, reason.remedy) for reason in verdict.reasons] == [
        ("quantization", "set inference.weights.quantization=fp8")
    ]
    with pytest.raises(BackendUnavailableError, match="which nobody asked for"):
        on(device, "fp8", quantization=None)
    with pytest.raises(BackendUnavailableError, match="fp8 does not take weights in int8"):
        on(device, "fp8", quantization="int8")
    with pytest.raises(BackendUnavailableError, match="fp8 computes in bfloat16, not in float16"):
        on(device, "fp8", dtype=torch.float16)
    with pytest.raises(BackendUnavailableError, match="torch does not take weights in fp8"):
        on(device, "torch")


@pytest.mark.parametrize(
    ("device", "words"),
    [(A100, "fp8 needs compute capability 8.9, NVIDIA A100 has 8.0"), (MI300X, "works on cuda or cpu, this is rocm")],
    ids=lambda value: getattr(value, "name", None),
)
def test_devices_without_the_type_are_refused_by_name(device, words) -> None:
    with pytest.raises(BackendUnavailableError, match=words) as refused:
        on(device)
    assert "leave inference.weights.quantization unset on this device" in refused.value.remedy


def test_on_a_gpu_it_needs_triton_and_on_a_cpu_it_does_not(monkeypatch) -> None:
    seen = survey(H100, has_triton=False)
    with pytest.raises(BackendUnavailableError, match=r"fp8: triton is not installed \[missing\]") as refused:
        select_kernel(ComputeKind.LINEAR, replace(SPEC, device=torch.device("cuda")), "auto", seen)
    assert "pip install triton" in refused.value.remedy
    monkeypatch.setattr(fp8_linear, "multiplies_on_cpu", lambda: True)
    assert select_kernel(ComputeKind.LINEAR, SPEC, "auto", seen).name == "fp8"


def test_a_cpu_serves_where_torch_can_and_points_to_int8_where_not(monkeypatch) -> None:
    monkeypatch.setattr(fp8_linear, "multiplies_on_cpu", lambda: True)
    assert select_kernel(ComputeKind.LINEAR, SPEC, "auto", survey()).name == "fp8"
    assert select_kernel(ComputeKind.LINEAR, replace(SPEC, quantization="int8"), "auto", survey()).name == "cpu"
    monkeypatch.setattr(fp8_linear, "multiplies_on_cpu", lambda: False)
    with pytest.raises(BackendUnavailableError, match="multiplies no e4m3 matrices on this CPU") as refused:
        select_kernel(ComputeKind.LINEAR, SPEC, "auto", survey())
    assert "inference.weights.quantization=int8" in refused.value.remedy
