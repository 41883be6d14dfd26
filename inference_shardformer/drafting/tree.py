"""The module tree of a decoder on the meta device: which layers it has, and what stands in them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class Kind:
    """All modules whose paths differ in the number of the layer alone."""

    pattern: str
    modules: list[nn.Module] = field(default_factory=list)

    @property
    def first(self) -> nn.Module:
        """One of them."""
        return self.modules[0]

    @property
    def class_names(self) -> list[str]:
        """The classes that occur."""
        return sorted({type(module).__name__ for module in self.modules})

    @property
    def leaf(self) -> str:
        """The last name of the path."""
        return self.pattern.rpartition(".")[2]

    @property
    def parent(self) -> str:
        """The pattern of the module around it."""
        return self.pattern.rpartition(".")[0]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the parameters that the first module holds itself."""
        return {name: tuple(parameter.shape) for name, parameter in self.first.named_parameters(recurse=False)}


def kinds_of(model: PreTrainedModel) -> dict[str, Kind]:
    """The kinds of modules by pattern, in the order of the tree."""
    kinds: dict[str, Kind] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if path:
            pattern = re.sub(r"\.\d+(?=\.|$)", ".*", path)
            kinds.setdefault(pattern, Kind(pattern)).modules.append(module)
    return kinds


def tensor_parallel_plan(model: PreTrainedModel) -> dict[str, str]:
    """Hugging Face's own plan by full pattern, of all versions: from the class, or from the configuration."""
    prefix = model.base_model_prefix
    plan: dict[str, str] = {}
    for name, style in (getattr(model.config, "base_model_tp_plan", None) or {}).items():
        plan[f"{prefix}.{name}"] = str(style)
    plan.update({name: str(style) for name, style in (getattr(model, "_tp_plan", None) or {}).items()})
    return plan
