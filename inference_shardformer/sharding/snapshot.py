"""ModelSnapshot: what a Hugging Face model was made of before it was sharded, so that it can become that again."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from inference_shardformer.errors import StateError


@dataclass
class _ModuleState:
    """One module and what it held. Hooks stay on the module, which itself is never changed otherwise."""

    module: nn.Module
    children: dict[str, nn.Module | None]
    parameters: dict[str, nn.Parameter | None]
    buffers: dict[str, torch.Tensor | None]
    training: bool


@dataclass(frozen=True)
class _TensorState:
    """A parameter before its memory was given up."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


class ModelSnapshot:
    """Modules, parameters, buffers, ties, modes and configuration of a model; holds the modules, but not the weights.

    `release` gives the memory of parameters up while the parameter objects, which users may hold, live on; `restore`
    puts everything back but the values, and `assign` gives a parameter its values again.
    """

    def __init__(self, model: nn.Module) -> None:
        self._states = [
            _ModuleState(
                module, dict(module._modules), dict(module._parameters), dict(module._buffers), module.training
            )
            for module in model.modules()
        ]
        self._named = dict(model.named_parameters(remove_duplicate=False))
        self._tensors = {
            id(parameter): _TensorState(parameter.shape, parameter.dtype, parameter.device)
            for parameter in self._named.values()
        }
        self._configs = [(config, dict(vars(config))) for config in _configs_of(model)]

    @property
    def parameters(self) -> Iterator[nn.Parameter]:
        """Every parameter as it was, by whatever name."""
        return iter(self._named.values())

    def aliases(self, names: Collection[str]) -> dict[str, str]:
        """Every other name of the parameters with these names, and the name among them."""
        owners = {id(self._named[name]): name for name in names if name in self._named}
        return {
            name: owners[id(parameter)]
            for name, parameter in self._named.items()
            if id(parameter) in owners and name not in names
        }

    def values_of(self, config: object) -> dict[str, object]:
        """What a configuration of the model held."""
        return next((dict(values) for known, values in self._configs if known is config), {})

    def shape(self, name: str) -> torch.Size:
        """The shape that a parameter had."""
        return self._tensors[id(self._named[name])].shape

    def release(self, names: Iterable[str]) -> None:
        """Give up the memory of parameters, whose values somebody else holds now."""
        for name in names:
            parameter = self._named[name]
            if not parameter.is_meta:
                parameter.data = torch.empty(0, dtype=parameter.dtype, device=parameter.device)

    def restore(self, *, is_training: bool | None = None) -> None:
        """Put every module, parameter object, buffer, mode and configuration value back where it was.

        `is_training` stands for the mode that the modules had.
        """
        for state in self._states:
            module = state.module
            for held, kept in (
                (module._modules, state.children),
                (module._parameters, state.parameters),
                (module._buffers, state.buffers),
            ):
                held.clear()
                held.update(kept)  # type: ignore[arg-type]  # each with its own kind
            module.training = state.training if is_training is None else is_training
        for config, values in self._configs:
            vars(config).clear()
            vars(config).update(values)

    def assign(self, name: str, value: torch.Tensor | None, *, dtype: torch.dtype | None = None) -> None:
        """Give a parameter its values, in the type it had unless `dtype` is given; `None` leaves it without memory.

        A parameter that never had memory (of a model built on the meta device) becomes another object, in all of its
        places.
        """
        parameter = self._named[name]
        state = self._tensors[id(parameter)]
        dtype = dtype or state.dtype
        if value is None:
            self._replace(parameter, torch.empty(state.shape, dtype=dtype, device="meta"))
            return
        if value.shape != state.shape:
            raise StateError(f"{name} has shape {list(value.shape)}, and had {list(state.shape)}", remedy="report this")
        if parameter.is_meta:
            self._replace(parameter, value.to(dtype))
        else:
            parameter.data = value.to(device=state.device, dtype=dtype)

    def fill_meta(self, values: nn.Module, device: torch.device) -> None:
        """Give buffers, and tensors in plain attributes, that are on the meta device the values of an equal model."""
        for state, other in zip(self._states, values.modules(), strict=True):
            module = state.module
            for held, found in ((module._buffers, other._buffers), (vars(module), vars(other))):
                for leaf, tensor in tuple(held.items()):
                    if isinstance(tensor, torch.Tensor) and tensor.is_meta:
                        held[leaf] = found[leaf].to(device)  # type: ignore[union-attr]  # an equal model

    def _replace(self, parameter: nn.Parameter, value: torch.Tensor) -> None:
        new = nn.Parameter(value, requires_grad=parameter.requires_grad)
        for state in self._states:
            for leaf, held in state.module._parameters.items():
                if held is parameter:
                    state.module._parameters[leaf] = new


def _configs_of(model: nn.Module) -> list[object]:
    """The configuration and those nested in it; each once."""
    found: dict[int, object] = {}
    waiting: list[object] = [getattr(model, "config", None), getattr(model, "generation_config", None)]
    while waiting:
        config = waiting.pop()
        if config is None or id(config) in found or not hasattr(config, "__dict__"):
            continue
        found[id(config)] = config
        waiting += [value for value in vars(config).values() if hasattr(value, "to_dict")]
    return list(found.values())
