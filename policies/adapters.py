"""What a policy does with module classes of the user's own: adapt them, or leave them out on purpose."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING

from torch import nn

from inference_shardformer.errors import PolicyError

if TYPE_CHECKING:
    from inference_shardformer.policies.base import PolicyEntry, ReplacementFactory


@dataclass(frozen=True)
class Adapters:
    """Factories for the user's own module classes, the rows of their extra parameters, and the classes left out.

    Classes are matched exactly, never by inheritance: what a subclass does differently would be lost.
    """

    factories: Mapping[type[nn.Module], ReplacementFactory] = field(default_factory=lambda: MappingProxyType({}))
    rows: tuple[PolicyEntry, ...] = ()
    left_out: frozenset[type[nn.Module]] = frozenset()

    def adapting(
        self, native_class: type[nn.Module], build: ReplacementFactory, rows: tuple[PolicyEntry, ...]
    ) -> Adapters:
        """These adapters and one more."""
        self._check_new(native_class)
        factories = MappingProxyType({**self.factories, native_class: build})
        return replace(self, factories=factories, rows=(*self.rows, *rows))

    def leaving_out(self, native_class: type[nn.Module]) -> Adapters:
        """These adapters and one more class that stays as it is.

        Raises `PolicyError` if its `forward` has no parameter `attn_metadata`: the packed batch would not reach it.
        """
        self._check_new(native_class)
        if "attn_metadata" not in inspect.signature(native_class.forward).parameters:
            raise PolicyError(
                f"{native_class.__name__} cannot be left out: its forward has no parameter `attn_metadata`, so the "
                "packed batch and the paged cache would not reach it",
                remedy="add the keyword parameter and use it, or give a factory with adapting()",
            )
        return replace(self, left_out=self.left_out | {native_class})

    def left_out_paths(self, model: nn.Module) -> frozenset[str]:
        """Where in a model the classes stand that are left out."""
        return frozenset(path for path, module in model.named_modules() if type(module) in self.left_out)

    def describe(self) -> str:
        """The classes by name, for comparing ranks."""
        adapted = sorted(native.__qualname__ for native in self.factories)
        return f"adapting {adapted}, leaving out {sorted(native.__qualname__ for native in self.left_out)}"

    def _check_new(self, native_class: type[nn.Module]) -> None:
        if native_class in self.factories or native_class in self.left_out:
            raise PolicyError(
                f"{native_class.__name__} is adapted or left out already", remedy="say once what to do with a class"
            )


NO_ADAPTERS = Adapters()
