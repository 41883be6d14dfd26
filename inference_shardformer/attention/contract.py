"""The version of the backend contract, and what a class must declare to be taken for a backend.

The contract is everything in `attention.base`: the methods, their arguments, the metadata and the meaning of the facts.
Its version is one integer, the major number of semantic versioning:

- It stays when something is added that an existing backend may ignore: a feature, a fact or a spec field with a default
  that means what was true before, a hook with a default.
- It grows by one when an existing backend would have to change: a method, an argument or a field is removed or renamed,
  a shape, a type or a meaning changes, something optional becomes required.

A backend states the version it was written for. This version and the one before it are loaded; what differs between the
two is translated here, and nowhere else, so a release that moves to N leaves authors the whole life of N to follow.
"""

from __future__ import annotations

import inspect

from inference_shardformer.attention.base import AttentionBackend
from inference_shardformer.attention.capabilities import AttentionCapabilities
from inference_shardformer.config.option_steps import declaration_problem

CONTRACT_VERSION = 1
SUPPORTED_VERSIONS = tuple(version for version in (CONTRACT_VERSION - 1, CONTRACT_VERSION) if version >= 1)


def contract_problem(loaded: object) -> str | None:
    """What keeps an object from being used as a backend class, in words; `None` if nothing does."""
    if not (isinstance(loaded, type) and issubclass(loaded, AttentionBackend)):
        return f"{loaded!r} is not a subclass of AttentionBackend"
    return _version_problem(loaded) or _declaration_problem(loaded)


def _version_problem(backend: type[AttentionBackend]) -> str | None:
    version = getattr(backend, "contract_version", None)
    if version in SUPPORTED_VERSIONS and type(version) is int:
        return None
    if version is None:
        return f"it declares no contract_version; write contract_version = {CONTRACT_VERSION}"
    known = f"this is contract {CONTRACT_VERSION}"
    if len(SUPPORTED_VERSIONS) > 1:
        known += f", which also loads contract {SUPPORTED_VERSIONS[0]}"
    return f"it is written for contract {version!r}, {known}"


def _declaration_problem(backend: type[AttentionBackend]) -> str | None:
    if not isinstance(getattr(backend, "capabilities", None), AttentionCapabilities):
        return "it declares no capabilities; write capabilities = AttentionCapabilities(...)"
    name = getattr(backend, "name", None)
    if not isinstance(name, str) or not name or name != name.strip().lower():
        return f"its name is {name!r}; write name = a word in lower case"
    if inspect.isabstract(backend):
        missing = ", ".join(sorted(backend.__abstractmethods__))
        return f"it does not implement {missing}"
    return declaration_problem(backend)
