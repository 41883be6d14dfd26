"""Whether a Hugging Face model is what it was: classes, bytes, ties, buffers, modes, configuration."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


def raw(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def digest(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """A digest of shape, type and bytes of every tensor."""
    return {
        name: hashlib.sha256(f"{tuple(tensor.shape)} {tensor.dtype}".encode() + raw(tensor)).hexdigest()
        for name, tensor in tensors.items()
    }


def portrait(model: nn.Module) -> dict[str, Any]:
    """Everything that unsharding must bring back, as plain values."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    ids: dict[int, list[str]] = {}
    for name, parameter in parameters.items():
        ids.setdefault(id(parameter), []).append(name)
    return {
        "classes": {path: type(module).__qualname__ for path, module in model.named_modules()},
        "order": [path for path, _ in model.named_modules()],
        "training": {path: module.training for path, module in model.named_modules()},
        "parameters": digest(parameters),
        "trainable": {name: parameter.requires_grad for name, parameter in parameters.items()},
        "ties": sorted(names for names in ids.values() if len(names) > 1),
        "buffers": digest(dict(model.named_buffers())),
        "hooks": {path: len(module._forward_hooks) for path, module in model.named_modules()},
        "config": {**model.config.to_dict(), "attention": model.config._attn_implementation},
    }
