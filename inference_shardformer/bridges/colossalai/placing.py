"""Placement: the modules of a plan, built, and handed to ModelSharder one by one for the native ones it shows."""

from __future__ import annotations

import inspect

from torch import nn

from inference_shardformer.bridges.colossalai.upstream import ModulePolicyDescription, SubModuleReplacementDescription
from inference_shardformer.errors import PolicyError
from inference_shardformer.sharding.plan import ShardingPlan
from inference_shardformer.sharding.sharder import ModuleBuilder

_CONTAINERS = (nn.ModuleList, nn.Sequential)


class NoPaddingModule:
    """The target of our replacement descriptions: gives what was built for a native module, with its backend bound."""

    @staticmethod
    def from_native_module(module: nn.Module, process_group: object = None, *, placement: Placement) -> nn.Module:
        """The module that takes the place of `module`; its ranks are those of the plan, which `process_group` spans."""
        return placement.stand_in(module)


class Placement:
    """What a plan puts where. Modules are built at construction; if one cannot be, nothing was changed.

    A module that holds others which are exchanged (a decoder layer) is made when those are in place, of whatever stands
    there then: a policy may have put a module of its own among them.
    """

    def __init__(self, model: nn.Module, plan: ShardingPlan, builder: ModuleBuilder) -> None:
        self._model = model
        self._builder = builder
        self._native = dict(model.named_modules())
        self._paths = {id(module): path for path, module in self._native.items()}
        self.parallel = {each.path: builder.build_parallel(each, self._native.get(each.path)) for each in plan.modules}
        self._built = dict(self.parallel)
        self._outer: dict[str, tuple[str, tuple[str, ...]]] = {}  # path -> its row, the names of the modules in it
        self._made: list[nn.Module] = []
        for path, row in sorted(plan.replaced, key=lambda replaced: -replaced[0].count(".")):
            self._build(path, row, plan)
        missing = [path for path in (*self._built, *self._outer) if path not in self._native]
        if missing:
            raise PolicyError(
                f"ModelSharder exchanges modules, and none stands at {missing[0]}",
                remedy="shard this model with InferenceShardformer, which adds modules as well",
            )

    def stand_in(self, native: nn.Module) -> nn.Module:
        """What takes the place of a native module: ours, or the module itself where the plan leaves it."""
        path = self._paths.get(id(native), "")
        if path in self._outer:
            row, names = self._outer[path]
            children = {name: native.get_submodule(name) for name in names}
            made = self._builder.build_replacement(path, row, native, children)
            self._made += [made] if made is not native else []
            return made
        return self._built.get(path, native)

    def descriptions(self) -> dict[type[nn.Module] | str, ModulePolicyDescription]:
        """What ModelSharder is told, by the class names of owners, the innermost first."""
        suffixes: dict[str, dict[str, None]] = {}
        for path in sorted((*self._built, *self._outer), key=lambda path: -path.count(".")):
            owner, suffix = self._owner(path)
            suffixes.setdefault(type(owner).__name__, {})[suffix] = None
        return {
            owner: ModulePolicyDescription(sub_module_replacement=[self._description(suffix) for suffix in found])
            for owner, found in suffixes.items()
        }

    def foreign_paths(self) -> frozenset[str]:
        """The planned paths that are not served by our modules: a policy put others there. These are checked."""
        here = {id(module) for module in self._model.modules()}
        foreign = frozenset(path for path, module in self.parallel.items() if id(module) not in here)
        for path, module in self._built.items():
            if hasattr(module, "backend") and id(module) not in here:
                _check_attention(path, self._model.get_submodule(path))
        return foreign

    def foreign_modules(self) -> list[nn.Module]:
        """What a policy put into the model beside our modules and the native ones; of nested ones the outermost."""
        known = {
            *self._paths,
            *(id(each) for module in (*self._built.values(), *self._made) for each in module.modules()),
        }
        found, waiting = [], [self._model]
        while waiting:
            module = waiting.pop()
            if id(module) in known:
                waiting += module.children()
            else:
                found.append(module)
        return found

    def _build(self, path: str, row: str, plan: ShardingPlan) -> None:
        prefix = f"{path}."
        names = tuple(name for name in (*self._built, *self._outer) if name.startswith(prefix))
        holds_replaced = any(other.startswith(prefix) for other, _ in plan.replaced)
        if holds_replaced and all(name in self._native for name in names):
            self._outer[path] = row, tuple(name.removeprefix(prefix) for name in names)
            return
        children = {name.removeprefix(prefix): self._built.pop(name) for name in names}
        native = self._native[path]
        built = self._builder.build_replacement(path, row, native, children)
        if built is native:  # it stays, with new modules inside
            self._built.update({f"{prefix}{name}": child for name, child in children.items()})
        else:
            self._built[path] = built

    def _owner(self, path: str) -> tuple[nn.Module, str]:
        """The module that ModelSharder finds by its class, and the suffix by which it finds the path in it."""
        parent, _, suffix = path.rpartition(".")
        while isinstance(self._native[parent], _CONTAINERS):
            parent, _, name = parent.rpartition(".")
            index, dot, rest = suffix.partition(".")
            suffix = f"{name}[{index}]{dot}{rest}"
        return self._native[parent], suffix

    def _description(self, suffix: str) -> SubModuleReplacementDescription:
        return SubModuleReplacementDescription(
            suffix, NoPaddingModule, kwargs={"placement": self}, ignore_if_not_exist=True
        )


def _check_attention(path: str, module: nn.Module) -> None:
    if "attn_metadata" not in inspect.signature(type(module).forward).parameters:
        raise PolicyError(
            f"{path} is now a {type(module).__name__}, whose forward has no parameter `attn_metadata`: the packed "
            "batch and the paged cache would not reach it",
            remedy="add the keyword parameter and use it, or leave the attention to the bridge's policy",
        )
