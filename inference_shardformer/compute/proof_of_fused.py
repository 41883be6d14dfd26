"""The proof of the kernels that place heads in the cache, run experts and draw tokens, against the references."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

from inference_shardformer.attention.base import KVLayout
from inference_shardformer.compute.base import ComputeKernel, ComputeSpec
from inference_shardformer.compute.experts import ExpertParts, ExpertsKernel
from inference_shardformer.compute.linear import LinearKernel, LinearShape, LinearWeight
from inference_shardformer.compute.proof import GATES, TOKENS, compare, noise
from inference_shardformer.compute.rotary_write import FusedRotaryWrite, RotaryWriteKernel
from inference_shardformer.compute.sampling import Draw, SamplingKernel
from inference_shardformer.errors import BackendUnavailableError, InferenceShardformerError
from inference_shardformer.kernels import reference, reference_experts, reference_sampling
from inference_shardformer.kv_cache.cache import LayerKVCache

_HEADS, _KV_HEADS = 6, 2
_BLOCKS, _BLOCK_SIZE = 5, 4
_EXPERTS, _EXPERT_SIZE = 6, 48
_VOCAB = 1000
_DRAWS = [(1.0, 0, 1.0), (0.7, 20, 1.0), (1.3, 0, 0.8), (0.9, 50, 0.6), (1.0, 1, 1.0), (2.0, 0, 0.05)]


def prove_rotary_write(kernel: RotaryWriteKernel, spec: ComputeSpec) -> None:
    """Turn and store heads of the model's size in every layout, all of their elements and half of them.

    Raises `BackendUnavailableError` with what differed. What leaves it to torch has nothing to prove.
    """
    if not isinstance(kernel, FusedRotaryWrite):
        return
    gen = torch.Generator().manual_seed(0)
    with torch.inference_mode(), _typed(kernel):
        for layout in KVLayout:
            for rotary_dim in {spec.head_dim, spec.head_dim // 4 * 2} - {0}:
                for tokens in TOKENS:
                    _prove_rotary_write(kernel, spec, tokens, rotary_dim, layout, gen)


def prove_sampling(kernel: SamplingKernel, spec: ComputeSpec) -> None:
    """Draw rows of every kind of setting, and find the likeliest tokens.

    Raises `BackendUnavailableError` with the rows that differ.
    """
    gen = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(len(_DRAWS), _VOCAB, generator=gen)
    _prove_greatest(kernel, logits, spec)
    draw = kernel.bind()
    if draw is not None:
        _prove_draw(kernel, draw, logits, spec)


def _prove_greatest(kernel: SamplingKernel, logits: torch.Tensor, spec: ComputeSpec) -> None:
    find = kernel.bind_greatest()
    if find is None:
        return
    rows = logits.clone()
    rows[1, [17, 400]] = rows[1].max() + 1  # the first among equals
    rows[2, 300] = torch.nan
    rows[3] = -torch.inf
    expected = rows.nan_to_num(nan=torch.inf).numpy().argmax(axis=-1).tolist()
    with torch.inference_mode(), _typed(kernel):
        values, indices = find(rows.to(spec.device))
    right = rows.gather(-1, torch.tensor(expected).unsqueeze(-1)).squeeze(-1)
    if indices.tolist() != expected or not torch.equal(values.cpu().nan_to_num(7.0), right.nan_to_num(7.0)):
        raise BackendUnavailableError(
            f"sampling kernel {kernel.name!r} finds the likeliest tokens {indices.tolist()}, and {expected} are right",
            remedy="choose another inference.kernels.sampling, and report this with the versions in use",
        )


def _prove_draw(kernel: SamplingKernel, draw: Draw, logits: torch.Tensor, spec: ComputeSpec) -> None:
    temperatures, top_ks, top_ps = (list(each) for each in zip(*_DRAWS, strict=True))
    limits = {
        "temperatures": torch.tensor(temperatures, dtype=torch.float32),
        "top_ks": torch.tensor(top_ks, dtype=torch.int32),
        "top_ps": torch.tensor(top_ps, dtype=torch.float64),
    }
    uniforms = torch.tensor([0.31, 0.62, 0.05, 0.93, 0.5, 0.77], dtype=torch.float64)
    around = [reference_sampling.sample(logits, **limits, uniforms=uniforms + step) for step in (-1e-5, 0.0, 1e-5)]
    is_clear = (around[0] == around[1]) & (around[1] == around[2])  # not beside the border of two tokens
    with torch.inference_mode(), _typed(kernel):
        ids = draw(
            logits.to(spec.device),
            temperatures=temperatures,
            top_ks=[int(top_k) for top_k in top_ks],
            top_ps=top_ps,
            uniforms=uniforms.tolist(),
        )
    wrong = [row for row in range(len(_DRAWS)) if is_clear[row] and int(ids[row]) != int(around[1][row])]
    if wrong:
        raise BackendUnavailableError(
            f"sampling kernel {kernel.name!r} differs from the reference: for (temperature, top_k, top_p) = "
            f"{_DRAWS[wrong[0]]} it draws token {int(ids[wrong[0]])}, and {int(around[1][wrong[0]])} is right",
            remedy="choose another inference.kernels.sampling, and report this with the versions in use",
        )


def prove_experts(kernel: ExpertsKernel, linear: LinearKernel, spec: ComputeSpec) -> None:
    """Mix experts of the model's hidden size. Raises `BackendUnavailableError` with what differed."""
    if not spec.has_experts:
        return
    act = GATES.get(spec.activation, torch.nn.functional.silu)
    gen = torch.Generator().manual_seed(0)
    gate_up, down = (
        [noise(gen, spec, *shape) / shape[1] ** 0.5 for _ in range(_EXPERTS)]
        for shape in ((2 * _EXPERT_SIZE, spec.hidden_size), (spec.hidden_size, _EXPERT_SIZE))
    )
    stored = [[_adopted(linear, spec, each) for each in group] for group in (gate_up, down)]
    with torch.inference_mode(), _typed(kernel):
        mix = kernel.bind(ExpertParts(stored[0], stored[1], act))
        if mix is None:
            return
        for tokens in TOKENS:
            x = noise(gen, spec, tokens, spec.hidden_size)
            scores = torch.rand(tokens, _EXPERTS, generator=gen).topk(2, dim=-1)
            shares, chosen = scores.values.to(spec.device, spec.dtype), scores.indices.to(spec.device)
            expected = reference_experts.mix(x, shares, chosen, gate_up=gate_up, down=down, act=act)
            compare(kernel, mix(x, shares, chosen), expected, spec)


@contextmanager
def _typed(kernel: ComputeKernel) -> Iterator[None]:
    try:
        yield
    except InferenceShardformerError:
        raise
    except Exception as exc:  # a kernel's library may raise anything
        message = f"{kernel.kind.value} kernel {kernel.name!r} failed its proof run: {type(exc).__name__}: {exc}"
        remedy = f"choose another inference.kernels.{kernel.kind.value}, and report this with the versions in use"
        raise BackendUnavailableError(message, remedy=remedy) from exc


def _adopted(linear: LinearKernel, spec: ComputeSpec, values: torch.Tensor) -> LinearWeight:
    weight = linear.weight(LinearShape(values.shape[1], values.shape[0], spec.dtype))
    weight.adopt(values.clone())
    return weight


def _prove_rotary_write(
    kernel: FusedRotaryWrite,
    spec: ComputeSpec,
    tokens: int,
    rotary_dim: int,
    layout: KVLayout,
    gen: torch.Generator,
) -> None:
    heads = noise(gen, spec, tokens, _HEADS + 2 * _KV_HEADS, spec.head_dim)
    angles = (6 * torch.rand(tokens, rotary_dim // 2, generator=gen)).repeat(1, 2)
    cos, sin = (each.to(spec.device, spec.dtype) for each in (angles.cos(), angles.sin()))
    slots = torch.randperm(_BLOCKS * _BLOCK_SIZE, generator=gen)[:tokens].to(spec.device)
    shape = layout.arrange((_BLOCKS, _BLOCK_SIZE, _KV_HEADS, spec.head_dim))
    ours, right = (LayerKVCache(*(_zeros(shape, spec) for _ in range(2))) for _ in range(2))
    out = kernel.rotate_and_write(heads, ours, slots, cos=cos, sin=sin, layout=layout)
    order: Literal["NHD", "HND"] = "HND" if layout is KVLayout.HND else "NHD"
    expected = reference.rotary_and_write_kv(heads.flatten(1), *right, slots, cos=cos, sin=sin, layout=order)
    compare(kernel, out, expected.double(), spec)
    for cache, wanted in zip(ours, right, strict=True):
        compare(kernel, cache, wanted.double(), spec)


def _zeros(shape: tuple[int, ...], spec: ComputeSpec) -> torch.Tensor:
    return torch.zeros(shape, dtype=spec.dtype, device=spec.device)
