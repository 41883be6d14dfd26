"""Builds a plan's modules with the factories of a policy's table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from inference_shardformer.errors import PolicyError
from inference_shardformer.policies.base import BuildContext, PolicyEntry, ReplaceEntry, StyleEntry
from inference_shardformer.sharding.plan import ModulePlan


class PolicyModuleBuilder:
    """The `ModuleBuilder` of one policy and one rank."""

    def __init__(self, table: Sequence[PolicyEntry], context: BuildContext) -> None:
        self._context = context
        self._parallel = {entry.row.pattern: entry for entry in table if isinstance(entry, StyleEntry)}
        self._replace = {entry.row.pattern: entry for entry in table if isinstance(entry, ReplaceEntry)}

    def build_parallel(self, module: ModulePlan, native: nn.Module | None) -> nn.Module:
        """The module of one planned path."""
        return self._parallel[module.row].build(module, native, self._context)

    def build_replacement(self, path: str, row: str, native: nn.Module, children: Mapping[str, nn.Module]) -> nn.Module:
        """The module in `native`'s place. A class the policy does not know is refused, never skipped."""
        entry = self._replace[row]
        if type(native).__name__ != entry.native_class:
            raise PolicyError(
                f"{path} is a {type(native).__name__}, but the policy replaces {entry.native_class}: what the other "
                "class does differently would be lost",
                remedy=f"give a policy with a row for {type(native).__name__}",
            )
        return entry.build(native, children, self._context)
