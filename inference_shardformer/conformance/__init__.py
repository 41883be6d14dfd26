"""The conformance kit: what every attention backend must do, as tests that its author does not have to write.

In a test file: `TestMine = backend_suite(MyBackend)`. Anywhere else: `run_suite(MyBackend)`. For policies:
`TestMine = policy_suite(MyPolicy, {"small": make_config})`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from inference_shardformer.conformance.runner import run_suite
    from inference_shardformer.conformance.suite import backend_suite
    from inference_shardformer.policy_conformance.suite import policy_suite

__all__ = ["backend_suite", "policy_suite", "run_suite"]

_EXPORTS = {
    "backend_suite": "inference_shardformer.conformance.suite",
    "policy_suite": "inference_shardformer.policy_conformance.suite",
    "run_suite": "inference_shardformer.conformance.runner",
}


def __getattr__(name: str) -> object:
    """Import on first use: pytest loads this package in every run, and only `backend_suite` needs torch."""
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)
