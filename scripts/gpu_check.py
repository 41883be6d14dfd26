"""Checks and measures everything on the CUDA device of this machine, within eight minutes; nothing is downloaded.

Every attention backend beside the reference, the engine's tokens beside Hugging Face `generate`, kernels beside the
copy bandwidth and the bf16 matrix rate of the device, and the engine beside Hugging Face on LLaMA shapes of one and
eight billion parameters with random weights, step by step and with captured decode steps. fp8 weights and caches: their
products and logits, and the same shapes in fp8.

    python scripts/gpu_check.py --json report.json

Ends with 0 if nothing was wrong, 1 if something was, 3 without a CUDA device.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from gpu_checking.attention import conformance_rows, speed_rows, usual_spec
from gpu_checking.engines import Mode, Sizes, greedy_rows, rounded_rows
from gpu_checking.engines import speed_rows as engine_rows
from gpu_checking.fp8 import logit_rows, product_rows
from gpu_checking.kernels import drawn_rows, family_rows, fused_speed_rows, kernel_rows, usual_kernel_spec
from gpu_checking.models import free_memory, make_model
from gpu_checking.ranks import rank_rows
from gpu_checking.roofline import Roofline, measure_roofline, roofline_rows
from gpu_checking.section import Budget, Row, Section, as_table, run_section

from inference_shardformer.attention.survey import make_survey
from inference_shardformer.errors import BackendUnavailableError

NO_DEVICE = 3
SECONDS = 480.0
USUAL = Sizes()
EAGER, GRAPHS = Mode("eager", {"graphs": "none"}), Mode("graphs", {"graphs": "auto"})
FP8 = Mode("fp8", {"graphs": "auto", "weights": {"quantization": "fp8"}})
FP8_CACHE = Mode("fp8 cache", {"graphs": "auto", "cache": {"dtype": "fp8"}})


def main(arguments: Sequence[str] | None = None) -> int:
    """Run every section that there is time for, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the report here, too")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="no section begins after so many seconds")
    parser.add_argument("--shapes", nargs="*", default=["1b", "8b"], help="model shapes to measure")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("gpu_check: torch sees no CUDA device on this machine")
        return NO_DEVICE
    device = torch.device("cuda", torch.cuda.current_device())
    print(_machine(device), flush=True)
    sections = []
    for section in check(device, Budget(args.seconds), shapes=args.shapes):
        print(as_table([section]), flush=True)
        sections.append(section)
    if args.json:
        report = {"machine": _machine(device), "sections": [section.to_json() for section in sections]}
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0 if all(section.is_right for section in sections) else 1


def check(
    device: torch.device,
    budget: Budget,
    *,
    shapes: Sequence[str],
    modes: Sequence[Mode] = (EAGER, GRAPHS),
    sizes: Sizes = USUAL,
    dtype: torch.dtype = torch.bfloat16,
) -> Iterator[Section]:
    """Every section in order of what matters most, so that those left out are the least."""
    bounds: list[Roofline] = []

    def roofline() -> Iterator[Row]:
        bounds.append(measure_roofline(device) if device.type == "cuda" else Roofline(1e10, 1e11))
        yield from roofline_rows(bounds[0])

    yield run_section("device", roofline, budget)
    survey, spec = make_survey(device), usual_spec(device, dtype)
    yield run_section("greedy tokens", lambda: _greedy(device, modes), budget, needs_s=20)
    yield run_section("two ranks", lambda: rank_rows(device), budget, needs_s=60)
    yield run_section("fp8 logits", lambda: logit_rows(device), budget, needs_s=20)
    yield run_section("kernels", lambda: kernel_rows(usual_kernel_spec(device, dtype)), budget, needs_s=10)
    yield run_section("greedy tokens of families", lambda: family_rows(device, modes), budget, needs_s=20)
    yield run_section("drawn tokens", lambda: drawn_rows(device), budget, needs_s=10)
    yield run_section("attention speed", lambda: speed_rows(spec, survey, bounds[0]), budget, needs_s=20)
    for shape in shapes:
        rows = lambda shape=shape: _engine(shape, device, dtype, modes, bounds[0], budget, sizes)  # noqa: E731
        yield run_section(f"LLaMA {shape}", rows, budget, needs_s=60)
        free_memory(device)
    fused = usual_kernel_spec(device, dtype)
    yield run_section("fused kernels", lambda: fused_speed_rows(fused, bounds[0]), budget, needs_s=10)
    yield run_section("fp8 products", lambda: product_rows(device, bounds[0]), budget, needs_s=10)
    for shape in shapes:
        rows = lambda shape=shape: _rounded(shape, device, bounds[0], sizes)  # noqa: E731
        yield run_section(f"LLaMA {shape} in fp8", rows, budget, needs_s=40)
        free_memory(device)
    yield run_section("attention, right or wrong", lambda: conformance_rows(spec, survey, budget), budget, needs_s=20)


def _greedy(device: torch.device, modes: Sequence[Mode]) -> Iterator[Row]:
    """In fp32, where nothing but a mistake changes a token."""
    yield from greedy_rows(make_model("tiny", device, torch.float32), device, modes)


def _engine(
    shape: str,
    device: torch.device,
    dtype: torch.dtype,
    modes: Sequence[Mode],
    bounds: Roofline,
    budget: Budget,
    sizes: Sizes,
) -> Iterator[Row]:
    yield from engine_rows(make_model(shape, device, dtype), device, modes, bounds, budget, sizes=sizes)


def _rounded(shape: str, device: torch.device, bounds: Roofline, sizes: Sizes) -> Iterator[Row]:
    """Keys and values in fp8, then weights, over one model in bf16: the second does not give it back."""
    model = make_model(shape, device, torch.bfloat16)
    for mode in (FP8_CACHE, FP8):
        try:
            yield from rounded_rows(model, mode, device, bounds, sizes=sizes)
        except BackendUnavailableError as exc:
            yield Row(mode.name, f"refused: {exc.message}")


def _machine(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device)
    capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
    return f"{name}, compute capability {capability}, torch {torch.__version__}, CUDA {torch.version.cuda}"


if __name__ == "__main__":
    sys.exit(main())
