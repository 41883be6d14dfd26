"""Builds a plan's modules with the factories of a policy's table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from inference_shardformer.errors import PolicyError
from inference_shardformer.policies.adapters import NO_ADAPTERS, Adapters
from inference_shardformer.policies.base import BuildContext, PolicyEntry, ReplaceEntry, StyleEntry
from inference_shardformer.sharding.plan import LEFT_OUT, ModulePlan


class PolicyModuleBuilder:
    """The `ModuleBuilder` of one policy and one rank."""

    def __init__(
        self, table: Sequence[PolicyEntry], context: BuildContext, *, adapters: Adapters = NO_ADAPTERS
    ) -> None:
        self._context = context
        self._adapters = adapters
        self._parallel = {entry.row.pattern: entry for entry in table if isinstance(entry, StyleEntry)}
        self._replace = {entry.row.pattern: entry for entry in table if isinstance(entry, ReplaceEntry)}

    def build_parallel(self, module: ModulePlan, native: nn.Module | None) -> nn.Module:
        """The module of one planned path."""
        if module.row == LEFT_OUT and native is not None:
            return native
        return self._parallel[module.row].build(module, native, self._context)

    def build_replacement(self, path: str, row: str, native: nn.Module, children: Mapping[str, nn.Module]) -> nn.Module:
        """The module in `native`'s place. A class the policy does not know is refused, never skipped."""
        entry, native_class = self._replace[row], type(native)
        build = self._adapters.factories.get(native_class)
        if build is not None:
            return build(native, children, self._context)
        if entry.native_class not in (None, native_class.__name__):
            raise PolicyError(
                f"{path} is a {native_class.__name__}, but the policy replaces {entry.native_class}: what the other "
                "class does differently would be lost",
                remedy=f"adapt it with policy.adapting({native_class.__name__}, build), or leave it as it is with "
                f"policy.leaving_out({native_class.__name__})",
            )
        return entry.build(native, children, self._context)
