"""What ColossalAI 0.5.0 does wrong on a CPU and at its import, mended for as long as the bridge needs it.

- `import colossalai` exports CUDA_DEVICE_MAX_CONNECTIONS=1 for the whole process (initialize.py:10), which serialises
  CUDA kernels of everybody else. `unchanged_environment` puts the old value back.
- `CpuAccelerator.get_rng_state` hands torch.get_rng_state an argument that it refuses: TypeError
  (accelerator/cpu_accelerator.py:102). Every parallel layer of ColossalAI calls it when it is built.
- `CpuAccelerator.manual_seed` raises RuntimeError, "not supported for cpu accelerator" (line 126). The same.
`mended_cpu_accelerator` exchanges the two methods, each only where it fails, and puts them back.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Protocol

import torch

_EXPORTED = "CUDA_DEVICE_MAX_CONNECTIONS"
_TALKATIVE = "bitsandbytes"  # tells at its import which kernels it could not download


class Accelerator(Protocol):
    """The part of ColossalAI's CpuAccelerator that fails."""

    def get_rng_state(self, device: object = None) -> torch.Tensor:
        """The state of the random numbers."""

    def manual_seed(self, seed: int) -> None:
        """Start the random numbers anew."""


@contextmanager
def unchanged_environment() -> Iterator[None]:
    """Put the variable that ColossalAI exports back to what it was, and keep warnings of its imports to itself."""
    before, logger = os.environ.get(_EXPORTED), logging.getLogger(_TALKATIVE)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of packages that ColossalAI tries to import, apex among them
            yield
    finally:
        logger.setLevel(level)
        if before is None:
            os.environ.pop(_EXPORTED, None)
        else:
            os.environ[_EXPORTED] = before


def cpu_defects(accelerator: Accelerator) -> tuple[str, ...]:
    """The methods of an accelerator that fail; the random numbers go on as if nothing had been tried."""
    state = torch.get_rng_state()
    try:
        return tuple(name for name, works in _TRIALS.items() if not works(accelerator))
    finally:
        torch.set_rng_state(state)


@contextmanager
def mended_cpu_accelerator(accelerator_class: type[Accelerator]) -> Iterator[tuple[str, ...]]:
    """For the length of a `with`, an accelerator on which ColossalAI's layers can be built; yields what was mended."""
    broken = cpu_defects(accelerator_class())
    before = {name: getattr(accelerator_class, name) for name in broken}
    for name in broken:
        setattr(accelerator_class, name, _MENDED[name])
    try:
        yield broken
    finally:
        for name, method in before.items():
            setattr(accelerator_class, name, method)


def _get_rng_state(self: Accelerator, device: object = None) -> torch.Tensor:
    return torch.get_rng_state()


def _manual_seed(self: Accelerator, seed: int) -> None:
    torch.manual_seed(seed)


def _can_get_state(accelerator: Accelerator) -> bool:
    try:
        accelerator.get_rng_state()
    except TypeError:
        return False
    return True


def _can_seed(accelerator: Accelerator) -> bool:
    try:
        accelerator.manual_seed(0)
    except RuntimeError:
        return False
    return True


_TRIALS: Mapping[str, Callable[[Accelerator], bool]] = MappingProxyType(
    {"get_rng_state": _can_get_state, "manual_seed": _can_seed}
)
_MENDED: Mapping[str, Callable[..., object]] = MappingProxyType(
    {"get_rng_state": _get_rng_state, "manual_seed": _manual_seed}
)
