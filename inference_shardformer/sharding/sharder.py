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


class ModulePlacer(Protocol):
    """Puts the modules of a plan into a model; if that fails, the model is unchanged."""

    def __call__(self, model: nn.Module, plan: ShardingPlan, builder: ModuleBuilder) -> frozenset[str]:
        """The planned paths at which somebody else's modules stand now; they are then none of the plan's."""


def place_planned(model: nn.Module, plan: ShardingPlan, builder: ModuleBuilder) -> frozenset[str]:
    """The `ModulePlacer` that puts every module of the plan into the model."""
    replace_modules(model, plan, builder)
    return frozenset()


def replace_modules(model: nn.Module, plan: ShardingPlan, builder: ModuleBuilder) -> None:
    """Put the plan's modules into the model. If building any of them fails, the model is unchanged.

    A module that is exchanged within another one is built first, and handed to the outer one as a child.
    """
    native = dict(model.named_modules())
    built = {module.path: builder.build_parallel(module, native.get(module.path)) for module in plan.modules}
    for path, row in sorted(plan.replaced, key=lambda replaced: -replaced[0].count(".")):
        prefix = f"{path}."
        children = {name[len(prefix) :]: built.pop(name) for name in tuple(built) if name.startswith(prefix)}
        built[path] = builder.build_replacement(path, row, native[path], children)
        if built[path] is native[path]:  # it stays, with new modules inside
            del built[path]
            built.update({f"{prefix}{name}": child for name, child in children.items()})
    for path, module in built.items():
        model.set_submodule(path, module)
