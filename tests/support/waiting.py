"""Watch: sees what would wait for a device, while everything runs on the CPU."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

# On a device each of these waits until it has computed the answer.
WAITING = ("_local_scalar_dense", "nonzero", "unique", "masked_select", "is_nonzero", "equal", "repeat_interleave")
READS = ("tolist", "item", "cpu", "__bool__", "__int__", "__float__", "__index__")


class Watch(TorchDispatchMode):
    """Counts the operators that a device would be waited for, and every read of a tensor."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.found: list[str] = []
        for name in READS:
            monkeypatch.setattr(torch.Tensor, name, self._noting(name, getattr(torch.Tensor, name)))

    def _noting(self, name, real):
        def read(tensor, *args, **kwargs):
            self.found.append(name)
            return real(tensor, *args, **kwargs)

        return read

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if any(word in name for word in WAITING):
            self.found.append(name)
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        if any(isinstance(each, torch.Tensor) and each.dtype == torch.bool for each in indices):
            self.found.append(f"{name} by a mask")
        return func(*args, **(kwargs or {}))
