"""What `--policy` names: `module:Class`, or `file.py:Class`."""

from __future__ import annotations

import importlib
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from inference_shardformer.cli.report import UsageError

if TYPE_CHECKING:
    from inference_shardformer.policies.base import Policy


def load_policy(name: str) -> Policy:
    """Make the policy that a command line names. A module may lie in the current folder. Raises `UsageError`."""
    from inference_shardformer.policies.base import Policy

    module_name, _, class_name = name.rpartition(":")
    if not module_name or not class_name:
        raise UsageError(f"--policy {name}: is not of the form module:Class", remedy="write my_policy:MyPolicy")
    policy_class = getattr(_module(module_name, name), class_name, None)
    if not isinstance(policy_class, type) or not issubclass(policy_class, Policy):
        raise UsageError(
            f"--policy {name}: {module_name} has no policy class {class_name}",
            remedy="name a class that derives from inference_shardformer.policies.base.Policy",
        )
    return policy_class()


def _module(module_name: str, name: str) -> ModuleType:
    file = Path(module_name if module_name.endswith(".py") else f"{module_name.replace('.', '/')}.py")
    try:
        return _from_file(file) if file.is_file() else importlib.import_module(module_name)
    except ImportError as exc:
        raise UsageError(
            f"--policy {name}: {module_name} cannot be imported: {exc}",
            remedy="give an installed module, or the path of a Python file",
        ) from exc


def _from_file(file: Path) -> ModuleType:
    spec = spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} is no Python file")
    module = module_from_spec(spec)
    sys.modules[file.stem] = module  # where classes look for their own module
    spec.loader.exec_module(module)
    return module
