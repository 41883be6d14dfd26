"""What the device can do: bytes copied and bf16 products in a second, measured, not read from a data sheet."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from gpu_checking.section import Row
from inference_shardformer.tuning.measure import make_clock


class Roofline(NamedTuple):
    """Bytes read and written in a second by a copy, and floating-point operations of a product of matrices."""

    bytes_per_s: float
    flops_per_s: float


def seconds_of(run: Callable[[], object], device: torch.device, *, rounds: int = 7, repeat: int = 5) -> float:
    """The median time of one call, over rounds of several, after a warm-up."""
    clock = make_clock(device)
    run()
    taken = []
    for _ in range(rounds):
        start = clock()
        for _ in range(repeat):
            run()
        taken.append((clock() - start) / repeat)
    return statistics.median(taken)


def measure_roofline(device: torch.device, *, copy_mib: int = 2048, matrix: int = 8192) -> Roofline:
    """Copy half of `copy_mib` onto the other half; multiply two square bf16 matrices of a size."""
    source = torch.ones(copy_mib << 19, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copied = seconds_of(lambda: target.copy_(source), device)
    a, b = (torch.randn(matrix, matrix, device=device).to(torch.bfloat16) for _ in range(2))
    multiplied = seconds_of(lambda: torch.mm(a, b), device)
    return Roofline(2 * source.nbytes / copied, 2 * matrix**3 / multiplied)


def roofline_rows(found: Roofline) -> Iterator[Row]:
    """Both bounds."""
    yield Row("copy bandwidth", f"{found.bytes_per_s / 1e9:.0f} GB/s", data={"bytes_per_s": found.bytes_per_s})
    yield Row("bf16 matrix rate", f"{found.flops_per_s / 1e12:.1f} TFLOP/s", data={"flops_per_s": found.flops_per_s})
