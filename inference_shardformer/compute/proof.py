"""The proof of compute kernels: small inputs at the model's real widths, compared with the reference kernels."""

from __future__ import annotations

import torch

from inference_shardformer.compute.activation import ActivationKernel
from inference_shardformer.compute.base import ComputeKernel, ComputeSpec
from inference_shardformer.compute.linear import LinearKernel, LinearShape
from inference_shardformer.compute.norm import NormKernel
from inference_shardformer.errors import BackendUnavailableError
from inference_shardformer.kernels import reference

# Relative to the largest expected value: wide enough for other orders of summation, far below a wrong row or column.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}
_INT8_TOLERANCE = 5e-2  # 127 steps for each row of weights, summed over the input features
_TOKENS = (1, 3, 17)  # a decode, a few decodes, a prompt
_OUT_FEATURES = 48  # three vectors of sixteen; the input features are the model's own


def prove(linear: LinearKernel, norm: NormKernel, activation: ActivationKernel, spec: ComputeSpec) -> None:
    """Run every kernel at the widths of the model; needs no weights and leaves no state.

    Raises `BackendUnavailableError` with what differed.
    """
    gen = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        for tokens in _TOKENS:
            _prove_linear(linear, spec, tokens, gen)
            _prove_norm(norm, spec, tokens, gen)
            if spec.activation in _GATES:
                _prove_activation(linear, activation, spec, tokens, gen)


_GATES = {
    "silu": torch.nn.functional.silu,
    "gelu_pytorch_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
}


def _prove_linear(kernel: LinearKernel, spec: ComputeSpec, tokens: int, gen: torch.Generator) -> None:
    for width in (spec.hidden_size, spec.intermediate_size):
        x, plain = _noise(gen, spec, tokens, width), _noise(gen, spec, _OUT_FEATURES, width)
        residual = _noise(gen, spec, tokens, _OUT_FEATURES)
        weight = kernel.weight(LinearShape(width, _OUT_FEATURES, spec.dtype))
        weight.adopt(plain.clone())
        expected = x.double() @ plain.double().T + residual.double()
        _compare(kernel, weight.multiply(x, None, residual), expected, spec)


def _prove_norm(kernel: NormKernel, spec: ComputeSpec, tokens: int, gen: torch.Generator) -> None:
    x, weight = _noise(gen, spec, tokens, spec.hidden_size), _noise(gen, spec, spec.hidden_size)
    _compare(kernel, kernel.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5).double(), spec)


def _prove_activation(
    linear: LinearKernel, kernel: ActivationKernel, spec: ComputeSpec, tokens: int, gen: torch.Generator
) -> None:
    act = _GATES[spec.activation]
    x, plain = _noise(gen, spec, tokens, spec.hidden_size), _noise(gen, spec, 2 * _OUT_FEATURES, spec.hidden_size)
    plain /= spec.hidden_size**0.5
    weight = linear.weight(LinearShape(spec.hidden_size, 2 * _OUT_FEATURES, spec.dtype, is_gated=True))
    weight.adopt(plain.clone())
    gate, up = (x.double() @ plain.double().T).chunk(2, dim=-1)
    _compare(kernel, kernel.project(x, weight, None, act), act(gate) * up, spec)


def _noise(gen: torch.Generator, spec: ComputeSpec, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=gen).to(spec.device, spec.dtype)


def _compare(kernel: ComputeKernel, out: torch.Tensor, expected: torch.Tensor, spec: ComputeSpec) -> None:
    tolerance = TOLERANCES[spec.dtype]
    if spec.quantization is not None:
        tolerance = max(tolerance, _INT8_TOLERANCE)
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
