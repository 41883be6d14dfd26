"""The kernels around attention on the device: a verdict and a proof for each, and the time of those that are fused."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch

from gpu_checking.engines import Mode, greedy_rows
from gpu_checking.models import free_memory, make_family
from gpu_checking.roofline import Roofline, seconds_of
from gpu_checking.section import Row
from inference_shardformer import InferenceConfig, InferenceShardformer, SamplingParams, ShardConfig
from inference_shardformer.attention.base import KVLayout
from inference_shardformer.attention.selector import Selection
from inference_shardformer.compute.base import ComputeKind, ComputeSpec
from inference_shardformer.compute.bound import ComputeKernels, build_kernels
from inference_shardformer.compute.rotary_write import FusedRotaryWrite
from inference_shardformer.compute.selection import KernelSurvey, make_kernel_survey, select_kernel
from inference_shardformer.config.sources import ConfigSources
from inference_shardformer.engine.distribution import drawn
from inference_shardformer.errors import BackendUnavailableError
from inference_shardformer.kernels import reference
from inference_shardformer.kv_cache.cache import LayerKVCache

_PLAIN = {
    ComputeKind.LINEAR: "torch",
    ComputeKind.NORM: "torch",
    ComputeKind.ROTARY_WRITE: "torch",
    ComputeKind.ACTIVATION: "torch",
    ComputeKind.EXPERTS: "torch",
    ComputeKind.DECODER_LAYER: "modules",
    ComputeKind.SAMPLING: "torch",
}
FAMILIES = ("mixtral", "longrope")


def usual_kernel_spec(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> ComputeSpec:
    """The widths of a LLaMA of eight billion parameters, with experts, so that every kernel has something to serve."""
    chosen = {"linear": "torch", "norm": "triton", "attention": "sdpa", "all_reduce": "none"}
    spec = ComputeSpec(device, dtype, 4096, 14336, activation="silu", layer_shape="llama", rotary="halves")
    return replace(spec, head_dim=128, has_experts=True, norm_adds=True, chosen=chosen)


def kernel_rows(spec: ComputeSpec) -> Iterator[Row]:
    """One row for each kernel of each kind: refused with its reasons, or whether it passes its proof here."""
    survey = make_kernel_survey(None, device=spec.device)
    for kind in ComputeKind:
        for verdict in select_kernel(kind, spec, "auto", survey).verdicts:
            name = f"{kind.value}: {verdict.name}"
            if verdict.reasons:
                reasons = "; ".join(f"{reason.message} [{reason.code}]" for reason in verdict.reasons)
                yield Row(name, f"refused: {reasons}", data={"codes": [reason.code for reason in verdict.reasons]})
                continue
            try:
                _built(spec, survey, {kind: verdict.name})
            except BackendUnavailableError as exc:
                yield Row(name, exc.message, False)
                continue
            yield Row(name, "right where it can be proven", True)


def fused_speed_rows(
    spec: ComputeSpec, bounds: Roofline, *, tokens: Sequence[int] = (1, 64, 1024), vocab_size: int = 128256
) -> Iterator[Row]:
    """What is fused beside torch, by the bytes that must be moved."""
    survey = make_kernel_survey(None, device=spec.device)
    plain = _built(spec, survey, {})
    fused = _built(spec, survey, {ComputeKind.NORM: "auto", ComputeKind.ROTARY_WRITE: "auto"})
    drawing = _built(spec, survey, {ComputeKind.SAMPLING: "auto"})
    for count in tokens:
        for kernels in (plain, fused):
            run, num_bytes = _sum_and_norm(kernels, spec, count)
            yield _timed(f"sum and norm, {kernels.norm.name}, {count} tokens", run, num_bytes, spec, bounds)
        run, num_bytes = _rotary(fused, spec, count)
        yield _timed(f"rotary and write, {fused.rotary_write.name}, {count} tokens", run, num_bytes, spec, bounds)
    by_name = {"torch": drawn, drawing.sampling.name: drawing.sampling.bind() or drawn}
    for count, (name, draw) in itertools.product((1, 64), by_name.items()):
        logits = torch.randn(count, vocab_size, device=spec.device)
        given = {"temperatures": [0.8] * count, "top_ks": [50] * count, "top_ps": [0.9] * count}
        run = partial(draw, logits, **given, uniforms=[0.4] * count)
        yield _timed(f"draw, {name}, {count} rows", run, logits.nbytes, spec, bounds)


def family_rows(device: torch.device, modes: Sequence[Mode]) -> Iterator[Row]:
    """Models whose steps could not be captured before: experts, and frequencies that depend on the length."""
    for family in FAMILIES:
        short = [mode._replace(settings={**mode.settings, "max_model_len": 256}) for mode in modes]
        for row in greedy_rows(make_family(family, device), device, short):
            yield row._replace(name=f"{family}, {row.name}")
        free_memory(device)


def drawn_rows(device: torch.device, *, new_tokens: int = 16) -> Iterator[Row]:
    """The same seeds with torch and with what `auto` takes."""
    found = {}
    for name in ("torch", "auto"):
        settings = {"dtype": "fp32", "kernels": {"sampling": name}}
        config = InferenceConfig.model_validate(settings)
        sources = ConfigSources(environ={})
        with InferenceShardformer(ShardConfig(device=device.type), config, sources=sources) as shardformer:
            engine = shardformer.attach(shardformer.optimize(make_family("longrope", device))[0])
            sampling = SamplingParams(max_new_tokens=new_tokens, temperature=0.9, top_k=40, top_p=0.9, ignore_eos=True)
            outputs = engine.generate([[number + 3, 5, 8] for number in range(16)], sampling)
            found[name] = [list(output.token_ids) for output in outputs]
            chosen = str(engine.config["inference.kernels.sampling"])
    equal = sum(ours == theirs for ours, theirs in zip(found["auto"], found["torch"], strict=True))
    value = f"{equal} of {len(found['auto'])} requests draw by {chosen} what they draw by torch"
    yield Row("drawn tokens", value, equal == len(found["auto"]), {"equal": equal})


def _built(spec: ComputeSpec, survey: KernelSurvey, asked: dict[ComputeKind, str]) -> ComputeKernels:
    """Plain kernels but for what is asked, proven."""
    selections: dict[ComputeKind, Selection] = {
        kind: select_kernel(kind, spec, asked.get(kind, _PLAIN[kind]), survey) for kind in ComputeKind
    }
    return build_kernels(selections, spec)


def _timed(name: str, run: Callable[[], object], num_bytes: int, spec: ComputeSpec, bounds: Roofline) -> Row:
    with torch.inference_mode():
        taken = seconds_of(run, spec.device)
    share = num_bytes / taken / bounds.bytes_per_s
    return Row(name, f"{taken * 1e6:.1f} us, {share:.0%} of the copy bandwidth", data={"share": share})


def _sum_and_norm(kernels: ComputeKernels, spec: ComputeSpec, count: int) -> tuple[Callable[[], object], int]:
    x, residual = (torch.randn(count, spec.hidden_size, device=spec.device, dtype=spec.dtype) for _ in range(2))
    weight = torch.ones(spec.hidden_size, device=spec.device, dtype=spec.dtype)
    return lambda: kernels.norm.add_rms_norm(x, residual, weight, 1e-5), 4 * x.nbytes


def _rotary(
    kernels: ComputeKernels, spec: ComputeSpec, count: int, *, num_heads: int = 32, num_kv_heads: int = 8
) -> tuple[Callable[[], object], int]:
    heads = torch.randn(count, num_heads + 2 * num_kv_heads, spec.head_dim, device=spec.device, dtype=spec.dtype)
    cos, sin = (torch.rand(count, spec.head_dim, device=spec.device, dtype=spec.dtype) for _ in range(2))
    shape = (count, 1, num_kv_heads, spec.head_dim)
    cache = LayerKVCache(*(torch.zeros(shape, device=spec.device, dtype=spec.dtype) for _ in range(2)))
    slots, kernel = torch.arange(count, device=spec.device), kernels.rotary_write
    if isinstance(kernel, FusedRotaryWrite):
        return lambda: kernel.rotate_and_write(
            heads, cache, slots, cos=cos, sin=sin, layout=KVLayout.NHD
        ), 2 * heads.nbytes
    return lambda: reference.rotary_and_write_kv(heads.flatten(1), *cache, slots, cos=cos, sin=sin), 2 * heads.nbytes
