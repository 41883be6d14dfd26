"""Small host values on their way to the device: through pinned memory, so that nobody waits for what is running."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def staged(values: Sequence[int] | Sequence[float], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """`[len(values)]` on the device. A copy from ordinary memory would wait until the stream has come to it."""
    host = torch.tensor(values, dtype=dtype)
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)
