"""Exchanges modules of a Hugging Face model for those of a plan: build everything first, then change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import nn

from inference_shardformer.sharding.plan import ModulePlan, ShardingPlan


class ModuleBuilder(Protocol):
    """Builds modules for a plan; made by a policy. Parameters stay on the meta device."""

    def build_parallel(self, module: ModulePlan, native: nn.Module | None) -> nn.Module:
        """The module for one planned path; `native` is what stands there now, if anything does."""

    def build_replacement(self, path: str, row: str, native: nn.Module, children: Mapping[str, nn.Module]) -> nn.Module:
        """The module that takes the place of `native`, made of the planned `children` below it."""


def replace_modules(model: nn.Module, plan: ShardingPlan, builder: ModuleBuilder) -> None:
    """Put the plan's modules into the model. If building any of them fails, the model is unchanged."""
    native = dict(model.named_modules())
    built = {module.path: builder.build_parallel(module, native.get(module.path)) for module in plan.modules}
    replacements: dict[str, nn.Module] = {}
    for path, row in plan.replaced:
        prefix = f"{path}."
        children = {name[len(prefix) :]: module for name, module in built.items() if name.startswith(prefix)}
        replacements[path] = builder.build_replacement(path, row, native[path], children)
    covered = tuple(f"{path}." for path in replacements)
    outer = {path: module for path, module in built.items() if not path.startswith(covered)} if covered else built
    for path, module in (outer | replacements).items():
        model.set_submodule(path, module)
