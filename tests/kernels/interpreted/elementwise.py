"""Triton's rotary, norm, activation and e4m3 kernels against their twins, in Triton's interpreter.

Not collected by its name: `test_triton_interpreted.py` runs it in a process of its own.
"""

# Triton 3.1's interpreter reads the annotations of kernels as they are: no postponing here.

import pytest
import torch
import triton
import triton.language as tl
import triton_interpreter

from inference_shardformer.compute.base import ComputeSpec
from inference_shardformer.compute.linear import LinearShape
from inference_shardformer.compute.torch_kernels import PlainWeight, TorchActivation, TorchNorm
from inference_shardformer.compute.triton_activation import TritonActivation
from inference_shardformer.compute.triton_norm import TritonNorm
from inference_shardformer.kernels import reference
from inference_shardformer.kernels.triton import activation, norm, rotary
from inference_shardformer.kernels.triton.fp8_kernel import from_e4m3, to_e4m3

triton_interpreter.mend_bfloat16()

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def noise(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def require_close(out: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal to one unit in the last place, as another order of summation may round."""
    assert out.shape == expected.shape
    assert out.dtype == expected.dtype
    step = torch.finfo(out.dtype).eps
    is_wide = out.dtype is torch.float32
    torch.testing.assert_close(out, expected, rtol=4 * step if is_wide else step, atol=1e-6 if is_wide else 1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [16, 100, 576])
@pytest.mark.parametrize(
    "rounding",
    [{}, {"weight_offset": 1.0}, {"rounds_before_weight": True}],
    ids=["plain", "gemma", "llama"],
)
def test_rms_norm(rounding, size, dtype):
    x, weight = noise(2, 3, size, dtype=dtype), noise(size, dtype=dtype)
    require_close(norm.rms_norm(x, weight, 1e-5, **rounding), reference.rms_norm(x, weight, 1e-5, **rounding))
    residual = noise(3, 2, size, dtype=dtype).view(2, 3, size)
    kept = residual.clone()
    out = norm.rms_norm(x, weight, 1e-5, residual=kept, **rounding)
    require_close(out, reference.rms_norm(x, weight, 1e-5, residual=residual, **rounding))
    assert torch.equal(kept, residual)


def test_rms_norm_takes_views_and_nothing():
    wide, weight = noise(5, 64), noise(24)
    assert torch.equal(norm.rms_norm(wide[:, 8:32], weight, 1e-6), norm.rms_norm(wide[:, 8:32].clone(), weight, 1e-6))
    assert norm.rms_norm(wide[:0, :24], weight, 1e-6).shape == (0, 24)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [8, 50, 1100])
def test_gates(size, dtype):
    gate_up = 3 * noise(2, 2, 2 * size, dtype=dtype)
    require_close(activation.silu_and_mul(gate_up), reference.silu_and_mul(gate_up))
    require_close(activation.gelu_and_mul(gate_up), reference.gelu_and_mul(gate_up))


def test_gates_at_the_ends_of_the_range():
    gate_up = torch.tensor([[-1e4, -90.0, 0.0, 90.0, 1e4, 1.0, 1.0, 1.0, 1.0, 1.0]])
    for gated, twin in (
        (activation.silu_and_mul, reference.silu_and_mul),
        (activation.gelu_and_mul, reference.gelu_and_mul),
    ):
        out = gated(gate_up)
        assert out.isfinite().all()
        torch.testing.assert_close(out, twin(gate_up), rtol=1e-6, atol=1e-6)
    assert activation.silu_and_mul(gate_up[:0]).shape == (0, 5)


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "head_dim", "rotary_dim"), [((6, 2), 16, 16), ((3, 1), 20, 12), ((15, 5), 8, 8)])
def test_rotary_and_write_kv(heads, head_dim, rotary_dim, dtype, layout):
    num_heads, num_kv_heads = heads
    shape = (4, 4, num_kv_heads, head_dim) if layout == "NHD" else (4, num_kv_heads, 4, head_dim)
    caches = [torch.zeros(shape, dtype=dtype) for _ in range(4)]
    slots = torch.tensor([3, -1, 12, 9, 11])
    fused = noise(5, (num_heads + 2 * num_kv_heads) * head_dim + 7, dtype=dtype)
    qkv = fused[:, :-7]
    table = noise(40, rotary_dim)
    positions = torch.tensor([0, 39, 7, 7, 20])
    cos, sin = (half.repeat(1, 2).to(dtype) for half in table[positions].chunk(2, dim=-1))
    for given in (
        {"kernel": "rotary_and_write_kv", "cos": cos, "sin": sin},
        {"kernel": "rotary_table_and_write_kv", "table": table, "positions": positions},
    ):
        name = given.pop("kernel")
        out = getattr(rotary, name)(qkv, *caches[:2], slots, **given, layout=layout)
        expected = getattr(reference, name)(qkv, *caches[2:], slots, **given, layout=layout)
        require_close(out, expected)
        for cache, right in zip(caches[:2], caches[2:], strict=True):
            require_close(cache, right)


def test_rotary_writes_a_cache_of_e4m3_and_takes_no_tokens():
    qkv, slots = 100 * noise(3, 4 * 16), torch.tensor([0, 5, 2])
    table, positions = noise(9, 16), torch.tensor([1, 8, 3])
    caches = [torch.zeros(2, 4, 1, 16, dtype=torch.float8_e4m3fn) for _ in range(2)]
    wide = [torch.zeros(2, 4, 1, 16) for _ in range(2)]
    rotary.rotary_table_and_write_kv(qkv, *caches, slots, table=table, positions=positions)
    reference.rotary_table_and_write_kv(qkv, *wide, slots, table=table, positions=positions)
    for cache, right in zip(caches, wide, strict=True):
        assert torch.equal(cache.float(), right.clamp(-448, 448).to(torch.float8_e4m3fn).float())
    out = rotary.rotary_table_and_write_kv(qkv[:0], *caches, slots[:0], table=table, positions=positions[:0])
    assert out.shape == (0, 2, 16)


@triton.jit
def _decode(out_ptr, in_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out_ptr + at, from_e4m3(tl.load(in_ptr + at), tl.float32))


@triton.jit
def _encode(out_ptr, in_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out_ptr + at, to_e4m3(tl.load(in_ptr + at)))


def test_every_e4m3_number_is_read_and_numbers_between_them_are_rounded_as_torch_does():
    codes = torch.arange(256, dtype=torch.uint8)
    values = torch.empty(256)
    _decode[(1,)](values, codes, SIZE=256)
    torch.testing.assert_close(values, codes.view(torch.float8_e4m3fn).float(), rtol=0, atol=0, equal_nan=True)
    ordered = values.nan_to_num(0.0).sort().values
    middle = (ordered[1:] + ordered[:-1]) / 2
    given = torch.cat([ordered, middle, noise(513) * torch.logspace(-4, 2, 513)]).clamp(-448, 448)
    given = torch.cat([given, -given])[:1024].contiguous()
    out = torch.empty(1024, dtype=torch.uint8)
    _encode[(1,)](out, given, SIZE=1024)
    assert torch.equal(out.view(torch.float8_e4m3fn).float(), given.to(torch.float8_e4m3fn).float())
    beyond = torch.tensor([449.0, 1e9, torch.inf, -torch.inf, torch.nan, -0.0, 1e-9, -1e-9])
    out = torch.empty(8, dtype=torch.uint8)
    _encode[(1,)](out, beyond, SIZE=8)
    assert out.tolist() == [0x7E, 0x7E, 0x7E, 0xFE, 0x7F, 0x80, 0, 0x80]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_chosen_norm_rounds_as_torch_does(dtype):
    spec = ComputeSpec(torch.device("cpu"), dtype, 96, 128)
    x, weight = noise(2, 3, 96, dtype=dtype), noise(96, dtype=dtype)
    for is_offset in (False, True):
        expected = TorchNorm(spec).rms_norm(x, weight, 1e-5, is_offset=is_offset)
        require_close(TritonNorm(spec).rms_norm(x, weight, 1e-5, is_offset=is_offset), expected)


@pytest.mark.parametrize(
    ("name", "act_fn"),
    [("silu", torch.nn.functional.silu), ("gelu_pytorch_tanh", torch.nn.GELU(approximate="tanh"))],
)
def test_the_chosen_activation_gates_what_the_weight_gives(name, act_fn):
    spec = ComputeSpec(torch.device("cpu"), torch.float32, 24, 40, activation=name)
    weight = PlainWeight(LinearShape(24, 80, torch.float32))
    weight.adopt(noise(80, 24) / 5)
    x, bias = noise(2, 3, 24), noise(80)
    expected = TorchActivation(spec).project(x, weight, bias, act_fn)
    require_close(TritonActivation(spec).project(x, weight, bias, act_fn), expected)
