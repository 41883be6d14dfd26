"""How a check ends badly, and the comparisons that end it so."""

from __future__ import annotations

import torch

# Wide enough for any order of summation at this type, far below what one wrong key changes.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


class ConformanceFailure(AssertionError):
    """A backend broke a rule of the contract; the message says which, and how far it is off."""


class ConformanceSkip(Exception):
    """A check that does not apply, with the reason."""


def require(holds: bool, message: str) -> None:
    """Fail with the message unless the rule holds."""
    __tracebackhide__ = True
    if not holds:
        raise ConformanceFailure(message)


def worst_difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest absolute difference; infinite where one of them is no number."""
    if actual.numel() == 0:
        return 0.0
    return (actual.double().cpu() - expected.double().cpu()).abs().nan_to_num(nan=torch.inf).max().item()


def require_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float, what: str) -> float:
    """Fail unless all values agree; returns the largest difference. Both are `[num_tokens, num_heads, head_dim]`."""
    __tracebackhide__ = True
    worst = worst_difference(actual, expected)
    if worst > tolerance:
        errors = (actual.double().cpu() - expected.double().cpu()).abs().nan_to_num(nan=torch.inf)
        wrong = (errors > tolerance).nonzero()
        token, head = wrong[0, 0].item(), wrong[0, 1].item()
        tokens = len(wrong[:, 0].unique())
        raise ConformanceFailure(
            f"{what}: off by up to {worst:.3g} where {tolerance:g} is allowed; "
            f"{tokens} of {len(errors)} tokens are wrong, the first is token {token} at head {head}"
        )
    return worst


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors hold the same bytes; NaN equals itself."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))
