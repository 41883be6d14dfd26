"""The proof of compute kernels: small inputs at the model's real widths, compared with the reference kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

import torch

from inference_shardformer.compute.activation import ActivationKernel
from inference_shardformer.compute.base import ComputeKernel, ComputeKind, ComputeSpec
from inference_shardformer.compute.linear import LinearKernel, LinearShape, LinearWeight
from inference_shardformer.compute.norm import NormKernel
from inference_shardformer.errors import BackendUnavailableError, InferenceShardformerError
from inference_shardformer.kernels import reference

# Relative to the largest expected value: wide enough for other orders of summation, far below a wrong row or column.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}
# int8: 127 steps for each row of weights. fp8: three bits of mantissa for weights and for activations.
_QUANTIZED_TOLERANCES = {"int8": 5e-2, "fp8": 0.15}
TOKENS = (1, 3, 17)  # a decode, a few decodes, a prompt
_OUT_FEATURES = 48  # three vectors of sixteen; the input features are the model's own


_GELU = partial(torch.nn.functional.gelu, approximate="tanh")
GATES: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = MappingProxyType(
    {
        "silu": torch.nn.functional.silu,
        "swish": torch.nn.functional.silu,
        "gelu_pytorch_tanh": _GELU,
        "gelu_new": _GELU,
    }
)


def prove(linear: LinearKernel, norm: NormKernel, activation: ActivationKernel, spec: ComputeSpec) -> None:
    """Run every kernel at the widths of the model; needs no weights and leaves no state.

    Raises `BackendUnavailableError` with what differed.
    """
    gen = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        for tokens in TOKENS:
            _prove_linear(linear, spec, tokens, gen)
            _prove_norm(norm, spec, tokens, gen)
            if spec.activation in GATES:
                _prove_activation(linear, activation, spec, tokens, gen)


def _prove_linear(kernel: LinearKernel, spec: ComputeSpec, tokens: int, gen: torch.Generator) -> None:
    for width in (spec.hidden_size, spec.intermediate_size):
        x, plain = noise(gen, spec, tokens, width), noise(gen, spec, _OUT_FEATURES, width)
        residual = noise(gen, spec, tokens, _OUT_FEATURES)
        weight = kernel.weight(LinearShape(width, _OUT_FEATURES, spec.dtype))
        weight.adopt(plain.clone())
        expected = x.double() @ plain.double().T + residual.double()
        compare(kernel, _multiplied(kernel, weight, x, residual), expected, spec)


def _multiplied(kernel: LinearKernel, weight: LinearWeight, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    try:
        return weight.multiply(x, None, residual)
    except InferenceShardformerError:
        raise
    except Exception as exc:  # a kernel's library may raise anything
        message = f"linear kernel {kernel.name!r} failed its proof run: {type(exc).__name__}: {exc}"
        remedy = "choose another inference.kernels.linear, and report this with the versions in use"
        raise BackendUnavailableError(message, remedy=remedy) from exc


def _prove_norm(kernel: NormKernel, spec: ComputeSpec, tokens: int, gen: torch.Generator) -> None:
    x, weight = noise(gen, spec, tokens, spec.hidden_size), noise(gen, spec, spec.hidden_size)
    compare(kernel, kernel.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5).double(), spec)
    residual = noise(gen, spec, tokens, spec.hidden_size)
    normed, total = kernel.add_rms_norm(x, residual, weight, 1e-5)
    compare(kernel, total, residual.double() + x.double(), spec)
    compare(kernel, normed, reference.rms_norm(x, weight, 1e-5, residual=residual.clone()).double(), spec)


def _prove_activation(
    linear: LinearKernel, kernel: ActivationKernel, spec: ComputeSpec, tokens: int, gen: torch.Generator
) -> None:
    act = GATES[spec.activation]
    x, plain = noise(gen, spec, tokens, spec.hidden_size), noise(gen, spec, 2 * _OUT_FEATURES, spec.hidden_size)
    plain /= spec.hidden_size**0.5
    weight = linear.weight(LinearShape(spec.hidden_size, 2 * _OUT_FEATURES, spec.dtype, is_gated=True))
    weight.adopt(plain.clone())
    gate, up = (x.double() @ plain.double().T).chunk(2, dim=-1)
    compare(kernel, kernel.project(x, weight, None, act), act(gate) * up, spec)


def noise(gen: torch.Generator, spec: ComputeSpec, *shape: int) -> torch.Tensor:
    """Normal numbers in the type and on the device of `spec`."""
    return torch.randn(*shape, generator=gen).to(spec.device, spec.dtype)


def compare(kernel: ComputeKernel, out: torch.Tensor, expected: torch.Tensor, spec: ComputeSpec) -> None:
    """Raise `BackendUnavailableError` where a result differs from what is expected, in float64, by too much."""
    tolerance = TOLERANCES[spec.dtype]
    if spec.quantization is not None and kernel.kind in (ComputeKind.LINEAR, ComputeKind.ACTIVATION):
        tolerance = max(tolerance, _QUANTIZED_TOLERANCES[spec.quantization])
    if out.shape != expected.shape or out.dtype != spec.dtype:
        problem = f"it returned {out.dtype} {tuple(out.shape)} for {spec.dtype} {tuple(expected.shape)}"
    else:
        worst = (out.double() - expected).abs().nan_to_num(nan=torch.inf).max().item() / expected.abs().max().item()
        if worst <= tolerance:
            return
        problem = f"by {worst:.3g} of the largest value where {tolerance:g} is allowed"
    raise BackendUnavailableError(
        f"{kernel.kind.value} kernel {kernel.name!r} differs from the reference: {problem}",
        remedy=f"choose another inference.kernels.{kernel.kind.value}, and report this with the versions in use",
    )
