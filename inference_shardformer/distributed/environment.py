"""The environment of the ranks: what the launcher said, and whether the process group fits what was asked."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from inference_shardformer.errors import EnvironmentMismatchError

JOIN_TIMEOUT_S = 60.0  # ranks arrive as far apart as their imports take

_REQUIRED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_LAST_PORT = 65535


@dataclass(frozen=True)
class RankEnvironment:
    """What the launcher told this process. Without a launcher: one rank."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    is_torchrun: bool

    @classmethod
    def detect(cls, environ: Mapping[str, str] | None = None) -> RankEnvironment:
        """Read the variables that torchrun sets."""
        environ = os.environ if environ is None else environ
        given = [name for name in _REQUIRED if environ.get(name)]
        if not given:
            return cls(0, 1, 0, 1, is_torchrun=False)
        if len(given) < len(_REQUIRED):
            missing = [name for name in _REQUIRED if name not in given]
            raise EnvironmentMismatchError(
                f"the launcher's variables are incomplete: {', '.join(given)} are set, {', '.join(missing)} are not",
                remedy="start the program with torchrun, which sets them all, or unset them",
            )
        rank, world_size = _number(environ, "RANK", None), _number(environ, "WORLD_SIZE", None)
        if rank >= world_size:
            raise EnvironmentMismatchError(
                f"RANK={rank} and WORLD_SIZE={world_size}: ranks are counted from 0, and there are WORLD_SIZE of them",
                remedy="start the program with torchrun, or correct the variables",
            )
        if (port := _number(environ, "MASTER_PORT", None)) > _LAST_PORT:
            raise EnvironmentMismatchError(
                f"MASTER_PORT={port} is no port: the last one is {_LAST_PORT}",
                remedy="start the program with torchrun, or correct the variable",
            )
        local_rank = _number(environ, "LOCAL_RANK", rank)
        return cls(rank, world_size, local_rank, _number(environ, "LOCAL_WORLD_SIZE", world_size), is_torchrun=True)


def ensure_process_group(device: torch.device, timeout_s: float, *, with_nccl: bool = True) -> bool:
    """Make the default process group from the launcher's variables when there is none; gloo alone on the CPU.

    Returns whether it was made here, so that whoever made it ends it. Without a launcher nothing is made. Ranks may
    arrive a minute apart, however short `timeout_s` is.
    """
    if dist.is_initialized() or not (environment := RankEnvironment.detect()).is_torchrun:
        return False
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" and with_nccl else "gloo"
    timeout = timedelta(seconds=max(timeout_s, JOIN_TIMEOUT_S))
    with _meeting(environment):
        store, rank, world_size = next(rendezvous("env://", timeout=timeout))
        # the launcher's store outlives the group, and a later group must not read what an earlier one left in it
        attempt = store.add(f"inference_shardformer/joined/{rank}", 1)
        own = dist.PrefixStore(f"inference_shardformer/world/{attempt}", store)
        dist.init_process_group(backend, store=own, rank=rank, world_size=world_size, timeout=timeout)
    return True


def process_group_for(tp_size: int | None, process_group: dist.ProcessGroup | None = None) -> dist.ProcessGroup | None:
    """The process group of a tensor-parallel engine: the one given, else the default one; `None` means one rank.

    Raises:
        EnvironmentMismatchError: `tp_size` is not the number of its ranks. With `tp_size=None` any number fits.
    """
    group = process_group
    if group is None and dist.is_initialized():
        group = dist.group.WORLD
    size = 1 if group is None else group.size()
    if tp_size is None or tp_size == size:
        return group
    if group is None:
        raise EnvironmentMismatchError(
            f"tp_size={tp_size}, but this is a single process: there is no launcher and no process group",
            remedy=f"start it with `torchrun --nproc-per-node {tp_size} ...`, or ask for tp_size=1",
        )
    whose = "the process group given" if process_group is not None else "the default process group"
    raise EnvironmentMismatchError(
        f"tp_size={tp_size}, but {whose} has {size} rank{'s' if size > 1 else ''}; the two must be equal",
        remedy=f"ask for tp_size={size}, start {tp_size} ranks, or give a process group of {tp_size} of the ranks",
    )


@contextmanager
def _meeting(environment: RankEnvironment) -> Iterator[None]:
    """Say in our words why the ranks of the launcher did not meet."""
    try:
        yield
    except RuntimeError as exc:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        reason = str(exc).partition("\n")[0]
        raise EnvironmentMismatchError(
            f"rank {environment.rank} of {environment.world_size} did not meet the others at {where}: {reason}",
            remedy="see whether all ranks were started, MASTER_ADDR is the host of rank 0, and MASTER_PORT is free "
            "there; torchrun sets both",
        ) from exc


def _number(environ: Mapping[str, str], name: str, default: int | None) -> int:
    text = environ.get(name, "")
    if not text and default is not None:
        return default
    if not text.isdecimal():
        raise EnvironmentMismatchError(
            f"{name}={text!r} is not a count; the launcher sets whole numbers",
            remedy="start the program with torchrun, or correct the variable",
        )
    return int(text)
