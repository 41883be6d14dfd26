"""What `doctor` tells of ColossalAI: read from what is installed, without importing it."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import NamedTuple

from inference_shardformer.bridges.colossalai.installing import IMPORTED, INSTALL, VERSION

MENDED = (
    "CpuAccelerator.get_rng_state raises TypeError",
    "CpuAccelerator.manual_seed raises RuntimeError",
    "import colossalai exports CUDA_DEVICE_MAX_CONNECTIONS",
)
"""Defects of version 0.5.0; `mending` says where they are and for how long the bridge works around them."""


class BridgeStatus(NamedTuple):
    """ColossalAI as it is installed; `missing` are packages it imports, `mended` what the bridge works around."""

    version: str
    missing: tuple[str, ...]
    mended: tuple[str, ...]
    remedy: str


def bridge_status(installed: Callable[[str], str] = version) -> BridgeStatus | None:
    """The status of the bridge; `None` where ColossalAI is not installed, which nothing but the bridge needs."""
    try:
        found = installed("colossalai")
    except PackageNotFoundError:
        return None
    missing = tuple(name for name in IMPORTED if find_spec(name) is None)
    is_known = found == VERSION
    return BridgeStatus(found, missing, MENDED if is_known else (), INSTALL if missing or not is_known else "")
