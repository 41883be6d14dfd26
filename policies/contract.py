"""What a class must declare to be taken for a policy. The contract itself is `policies.base`."""

from __future__ import annotations

import inspect

from inference_shardformer.config.option_steps import declaration_problem
from inference_shardformer.policies.base import Policy

CONTRACT_VERSION = 1
"""Grows when an existing policy would have to change; see `attention.contract` for what that means."""
SUPPORTED_VERSIONS = tuple(version for version in (CONTRACT_VERSION - 1, CONTRACT_VERSION) if version >= 1)


def policy_problem(loaded: object) -> str | None:
    """What keeps an object from being used as a policy class, in words; `None` if nothing does."""
    if not (isinstance(loaded, type) and issubclass(loaded, Policy)):
        return f"{loaded!r} is not a subclass of Policy"
    version = loaded.contract_version
    if type(version) is not int or version not in SUPPORTED_VERSIONS:
        return f"it is written for contract {version!r}, this is contract {CONTRACT_VERSION}"
    if inspect.isabstract(loaded):
        return f"it does not implement {', '.join(sorted(loaded.__abstractmethods__))}"
    architectures = getattr(loaded, "architectures", ())
    if not isinstance(architectures, tuple) or not all(isinstance(name, str) for name in architectures):
        return f"its architectures are {architectures!r}, not a tuple of names"
    return declaration_problem(loaded)
