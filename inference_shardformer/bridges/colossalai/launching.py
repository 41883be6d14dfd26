"""launch_from_torch, as ColossalAI's scripts begin: the process group, the seed, and a device for `.cuda()`."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import nn

from inference_shardformer.distributed.environment import RankEnvironment, ensure_process_group
from inference_shardformer.errors import ConfigError

_LOGGER = logging.getLogger(__name__)
_TIMEOUT_S = 1800.0  # as torch's own; an engine bounds its steps itself
_OF_TORCH = nn.Module.cuda


def launch_from_torch(
    backend: str = "nccl",
    seed: int = 1024,
    verbose: bool = True,
    *,
    config: Mapping[str, object] | None = None,
) -> None:
    """Make the default process group of torchrun's environment, and seed torch.

    Without torchrun this process is the only rank, where ColossalAI raised. The backend is what the device needs: gloo
    on a CPU, whatever is asked for. Where torch has no CUDA device, `module.cuda()` then leaves a module where it is,
    so that scripts written for one run (see `stay_on_cpu`). `config`, of older versions, must be empty.
    """
    if config:
        raise ConfigError(
            f"launch_from_torch: config={dict(config)!r} configures training, which is not offered here",
            remedy="leave config out",
        )
    has_cuda = torch.cuda.is_available()
    device = torch.device("cuda", RankEnvironment.detect().local_rank) if has_cuda else torch.device("cpu")
    if has_cuda:
        torch.cuda.set_device(device)
    else:
        stay_on_cpu()
    made = ensure_process_group(device, timeout_s=_TIMEOUT_S)
    torch.manual_seed(seed)
    if verbose:
        asked = "" if has_cuda or backend != "nccl" else "; nccl was asked for and needs a CUDA device"
        _LOGGER.info("%s on %s, seed %d%s", "process group made" if made else "nothing to launch", device, seed, asked)


def stay_on_cpu() -> None:
    """From now on `module.cuda()` returns the module as it is, with a warning; torch alone would raise.

    Nothing changes where torch has a CUDA device. `module_cuda_again` undoes it.
    """
    if not torch.cuda.is_available():
        nn.Module.cuda = _stay  # type: ignore[method-assign, assignment]


def module_cuda_again() -> None:
    """`module.cuda()` is torch's own again."""
    nn.Module.cuda = _OF_TORCH  # type: ignore[method-assign]


def _stay(module: nn.Module, device: int | torch.device | None = None) -> nn.Module:
    _LOGGER.warning("%s.cuda(): torch has no CUDA device here, the module stays on the CPU", type(module).__name__)
    return module
