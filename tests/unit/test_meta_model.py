"""A model on the meta device: shaped as the real one, and nobody draws values for what has no memory."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from tiny_models import tiny_config
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForCausalLM

from inference_shardformer.huggingface import build_on_meta


class Drawn(TorchDispatchMode):
    """Notes every random operator, and whether it had memory to fill."""

    def __init__(self) -> None:
        super().__init__()
        self.devices: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.devices.append(args[0].device.type)
        return func(*args, **(kwargs or {}))


class NoisyForCausalLM(LlamaForCausalLM):
    """A model that draws a table of its own in memory, whatever the device around it."""

    def __init__(self, config):
        super().__init__(config)
        self.noise = torch.empty(8, device="cpu").uniform_(1.0, 2.0)


def test_nothing_is_drawn_and_every_shape_is_that_of_the_real_model() -> None:
    config = tiny_config("gqa")
    with Drawn() as drawn:
        model = build_on_meta(config, "LlamaForCausalLM")
    assert drawn.devices == []
    real = {name: (each.shape, each.dtype) for name, each in LlamaForCausalLM(config).named_parameters()}
    assert {name: (each.shape, each.dtype) for name, each in model.named_parameters()} == real
    assert all(each.is_meta for each in model.parameters())


def test_without_it_torch_draws() -> None:
    with Drawn() as drawn, torch.device("meta"):
        LlamaForCausalLM(tiny_config("gqa"))
    assert set(drawn.devices) == {"meta"}


def test_what_has_memory_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_module("transformers"), "NoisyForCausalLM", NoisyForCausalLM, raising=False)
    with Drawn() as drawn:
        model = build_on_meta(tiny_config("gqa"), "NoisyForCausalLM")
    assert drawn.devices == ["cpu"]
    assert model.noise.min() >= 1.0
    assert model.noise.max() <= 2.0
