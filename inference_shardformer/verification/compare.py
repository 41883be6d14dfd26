"""Comparisons of what a rank computes with what the unsharded model does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from inference_shardformer.verification.mapping import Part
from inference_shardformer.verification.reference import Activation, Reference

TOLERANCE = 2e-5  # of the largest expected value; fp32 sums in another order stay below a tenth of it


class Comparison(NamedTuple):
    """The largest difference relative to the largest expected value; `is_whole` where nothing had to be inferred."""

    error: float
    is_whole: bool


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Infinite where one is not finite and the other is."""
    got, want = got.detach().float().cpu(), want.float()
    if got.numel() == 0:
        return 0.0
    known = torch.isfinite(want)
    if not torch.equal(known, torch.isfinite(got)):
        return float("inf")
    largest = float(want[known].abs().max()) if known.any() else 0.0
    difference = float((got[known] - want[known]).abs().max()) if known.any() else 0.0
    return difference / max(largest, 1e-6)


def compare_whole(got: torch.Tensor, want: torch.Tensor, *, tp_rank: int, tp_size: int) -> Comparison | None:
    """Compare features by token. Fewer than expected are taken for this rank's run of heads; else nothing is known."""
    if got.shape == want.shape:
        return Comparison(relative_error(got, want), is_whole=True)
    here, whole = got.shape[-1], want.shape[-1]
    if got.shape[0] != want.shape[0] or not here or whole % here or whole // here > tp_size:
        return None
    start = tp_rank * (whole // here) // tp_size * here
    return Comparison(relative_error(got, want[:, start : start + here]), is_whole=False)


def compare_parts(
    got: torch.Tensor, parts: Sequence[Part], rows: torch.Tensor, reference: Reference, *, is_input: bool
) -> Comparison | None:
    """Compare what the plan says that this rank holds of each native module."""
    worst, has_any = 0.0, False
    for part in parts:
        calls = reference.activations.get(part.module)
        want = _features(calls[0], is_input) if calls else None
        if want is None or want.shape[-1] < part.stop:
            continue
        here = got[:, part.offset : part.offset + part.stop - part.start]
        worst = max(worst, relative_error(here, want[rows, part.start : part.stop]))
        has_any = True
    return Comparison(worst, is_whole=True) if has_any else None


def _features(call: Activation, is_input: bool) -> torch.Tensor | None:
    if is_input:
        return call.entered
    return call.left[0] if call.left else None
