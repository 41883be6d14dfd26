"""fp8 on the device: its products beside float64 and beside bf16, and logits of rounded engines beside fp32."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from transformers import AutoModelForCausalLM

from gpu_checking.roofline import Roofline, seconds_of
from gpu_checking.section import Row
from inference_shardformer import InferenceConfig, InferenceShardformer, SamplingParams, ShardConfig
from inference_shardformer.cli.models import resolve_model
from inference_shardformer.compute.base import ComputeKind, ComputeSpec
from inference_shardformer.compute.fp8_linear import Fp8Linear
from inference_shardformer.compute.linear import LinearShape, LinearWeight
from inference_shardformer.compute.selection import make_kernel_survey, select_kernel
from inference_shardformer.config.sources import ConfigSources
from inference_shardformer.errors import BackendUnavailableError
from inference_shardformer.kernels.reference import dequantize_e4m3, quantize_e4m3

# Input and output features of a LLaMA of eight billion parameters: qkv, o, gate and up, down.
PROJECTIONS = ((4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096))
TOKENS = (1, 16, 1024)
LARGEST_ERROR = 0.01  # root mean square, relative; rounding to bf16 alone is 0.0017
# Settings of an engine, and how far its logits may be from those of fp32, in units of their spread.
ENGINES: dict[str, tuple[dict[str, object], float]] = {
    "bf16": ({}, 0.015),
    "fp8 weights": ({"weights": {"quantization": "fp8"}}, 0.075),
    "fp8 keys and values": ({"cache": {"dtype": "fp8"}}, 0.035),
    "fp8 both": ({"weights": {"quantization": "fp8"}, "cache": {"dtype": "fp8"}}, 0.08),
}


def product_rows(
    device: torch.device,
    bounds: Roofline,
    *,
    projections: Sequence[tuple[int, int]] = PROJECTIONS,
    tokens: Sequence[int] = TOKENS,
) -> Iterator[Row]:
    """Whether the product of rounded matrices is right, and its time with the rounding of activations in it."""
    spec = ComputeSpec(device, torch.bfloat16, *projections[-1][::-1], quantization="fp8")
    try:
        select_kernel(ComputeKind.LINEAR, spec, "fp8", make_kernel_survey(None, device=device))
    except BackendUnavailableError as exc:
        yield Row("fp8 products", f"refused: {exc.message}")
        return
    kernel, gen = Fp8Linear(spec), torch.Generator(device).manual_seed(0)
    with torch.inference_mode():
        for depth, width in projections:
            plain = torch.randn(width, depth, generator=gen, device=device).to(torch.bfloat16)
            weight = kernel.weight(LinearShape(depth, width, torch.bfloat16))
            weight.adopt(plain)
            for count in tokens:
                x = torch.randn(count, depth, generator=gen, device=device).to(torch.bfloat16)
                yield _product_row(weight, x, plain, bounds)


def logit_rows(device: torch.device, *, num_sequences: int = 4, num_tokens: int = 256) -> Iterator[Row]:
    """Engines over the trained demo model, on text of its own making."""
    folder = resolve_model("demo")
    whole = AutoModelForCausalLM.from_pretrained(folder).float().to(device).eval()
    torch.manual_seed(0)
    with torch.inference_mode():
        begun = torch.randint(whole.config.vocab_size, (num_sequences, 4), device=device)
        given = {"attention_mask": torch.ones_like(begun), "pad_token_id": 0, "eos_token_id": None}
        ids = whole.generate(begun, do_sample=True, max_new_tokens=num_tokens, **given)
        expected = whole(ids).logits.flatten(0, 1)
    spread = (expected - expected.mean(dim=-1, keepdim=True)).square().mean().sqrt()
    for name, (settings, bound) in ENGINES.items():
        try:
            logits, served = _engine_logits(folder, device, settings, ids.tolist())
        except BackendUnavailableError as exc:
            yield Row(name, f"refused: {exc.message}")
            continue
        error = ((logits - expected).square().mean().sqrt() / spread).item()
        yield Row(name, f"logits off by {error:.4f} of their spread; {served}", error <= bound, {"error": error})


def _product_row(weight: LinearWeight, x: torch.Tensor, plain: torch.Tensor, bounds: Roofline) -> Row:
    """One product, beside that of bf16 in time and beside float64 in value."""
    error = _error(weight.multiply(x), x, plain)
    taken = seconds_of(lambda: weight.multiply(x), x.device)
    bf16 = seconds_of(lambda: torch.nn.functional.linear(x, plain), x.device)
    share, rate = plain.numel() / taken / bounds.bytes_per_s, 2 * len(x) * plain.numel() / taken / bounds.flops_per_s
    value = f"{taken * 1e6:.0f} us, {bf16 / taken:.2f} x bf16, weights at {share:.0%} of the copy bandwidth, "
    value += f"{rate:.0%} of the bf16 matrix rate; off by {error:.2%}"
    data = {"error": error, "seconds": taken, "bf16_seconds": bf16, "share": share}
    return Row(f"{len(x)} x {plain.shape[1]} -> {plain.shape[0]}", value, error <= LARGEST_ERROR, data)


def _error(out: torch.Tensor, x: torch.Tensor, plain: torch.Tensor) -> float:
    """Of a product, beside that of what both sides are rounded to, in float64."""
    rounded, weight = (dequantize_e4m3(*quantize_e4m3(each)).double() for each in (x, plain))
    expected = rounded @ weight.T
    return ((out.double() - expected).square().mean().sqrt() / expected.square().mean().sqrt()).item()


def _engine_logits(
    folder: str, device: torch.device, settings: dict[str, object], sequences: Sequence[list[int]]
) -> tuple[torch.Tensor, str]:
    """float32 logits at every token, and what served."""
    config = InferenceConfig.model_validate({"dtype": "bf16", **settings})
    hidden: list[torch.Tensor] = []
    nothing = ConfigSources(environ={})
    with InferenceShardformer(ShardConfig(device=device.type), config, sources=nothing) as shardformer:
        model = shardformer.from_pretrained(folder)
        engine = shardformer.attach(model)
        model.get_submodule("model").register_forward_hook(
            lambda module, args, output: hidden.append(output.last_hidden_state.flatten(0, -2).clone())
        )
        for sequence in sequences:
            engine.reset_prefix_cache()  # every token is to be computed
            engine.generate([sequence], SamplingParams(max_new_tokens=1, ignore_eos=True))
        with torch.inference_mode():
            logits = model.get_submodule("lm_head")(torch.cat(hidden)).float()[:, : model.config.vocab_size].clone()
        chosen = {name: engine.config[f"inference.{name}"] for name in ("attention.backend", "kernels.linear")}
    return logits, ", ".join(f"{name} {value}" for name, value in chosen.items())
