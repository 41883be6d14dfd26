"""What stands between host and device: small values through pinned memory, so that nobody waits for what is running."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch

from inference_shardformer.errors import StateError


def staged(values: Sequence[int] | Sequence[float], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """`[len(values)]` on the device. A copy from ordinary memory would wait until the stream has come to it."""
    host = torch.tensor(values, dtype=dtype)
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Where kernels are launched on this device, which tensors are on: each thread has a current one of its own."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class OnItsWay:
    """Numbers on their way to the host: what is done before they are waited for is done while the device computes them.

    What the stream is given after this is not waited for.
    """

    def __init__(self, t: torch.Tensor, is_given_up: Callable[[], bool] = lambda: False) -> None:
        """`is_given_up` says that the ranks have failed: a device that waits for a lost one may never end."""
        self._host = t
        self._is_given_up = is_given_up
        self._is_here: torch.cuda.Event | None = None
        if t.is_cuda:
            self._host = torch.empty(t.shape, dtype=t.dtype, pin_memory=True)
            self._host.copy_(t, non_blocking=True)
            self._is_here = torch.cuda.Event()
            self._is_here.record(torch.cuda.current_stream(t.device))

    def wait(self) -> list[int]:
        """The integers of `[n]`. Raises `StateError` once the ranks have failed."""
        return self._arrived().tolist()

    def wait_for_rows(self) -> list[list[float]]:
        """The numbers of `[n, m]`, in the same way."""
        return self._arrived().tolist()

    def _arrived(self) -> torch.Tensor:
        while self._is_here is not None and not self._is_here.query():
            if self._is_given_up():
                raise StateError(
                    "the ranks failed while this one waited for its device",
                    remedy="end this process: its device may wait for ever for a rank that is gone",
                )
            time.sleep(0)  # others may run
        return self._host
