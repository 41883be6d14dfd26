"""One rank examines itself: machine, environment, plug-ins, backends."""

from __future__ import annotations

import os
import socket
from typing import NamedTuple

import torch

from inference_shardformer.attention.survey import BACKENDS, BackendRegistry
from inference_shardformer.bridges.colossalai.status import bridge_status
from inference_shardformer.config.loader import merge_layers
from inference_shardformer.config.sources import Layers
from inference_shardformer.distributed.devices import device_of_rank
from inference_shardformer.distributed.environment import RankEnvironment
from inference_shardformer.doctor import machine
from inference_shardformer.doctor.attention import examine_attention, wanted_by_model, wanted_usually
from inference_shardformer.doctor.report import BridgeReport, CpuUse, RankReport
from inference_shardformer.errors import EnvironmentMismatchError
from inference_shardformer.probing.collect import collect_facts
from inference_shardformer.resolving.resolution import resolve_device, resolve_threads
from inference_shardformer.sharding.plan import RankLayout


class _Place(NamedTuple):
    """Where this rank stands, and what is wrong with what it was told."""

    environment: RankEnvironment
    device: torch.device
    device_reason: str
    problems: tuple[str, ...]


def collect_report(layers: Layers, model: str | None, registry: BackendRegistry = BACKENDS) -> RankReport:
    """Everything this rank can find out. Raises only what is wrong with the settings, the model, or their fit."""
    shard = merge_layers(layers).shard
    place = _place(layers)
    env = place.environment
    layout = RankLayout(env.world_size, env.rank)
    if model is None:
        wanted = wanted_usually(layers, layout, place.device)
    else:
        wanted = wanted_by_model(model, layers, layout, place.device)
    attention, *others = examine_attention(wanted, registry)
    threads, reason = resolve_threads(shard, env.local_world_size)
    native = machine.native_kernels()  # before the OpenMP runtimes are counted
    return RankReport(
        rank=env.rank,
        world_size=env.world_size,
        ranks_on_host=env.local_world_size,
        hostname=socket.gethostname(),
        versions=machine.versions() | {"torch": torch.__version__},
        host=collect_facts(),
        device=str(place.device),
        device_reason=place.device_reason,
        cpu_use=CpuUse(
            machine.num_cores(), machine.core_quota(), threads, reason or "as asked", machine.openmp_runtimes()
        ),
        native=native,
        memory=machine.memory(),
        environment=machine.environment(os.environ),
        plugins={name: origin for name in registry.names() if not _is_ours(origin := registry.origin(name))},
        attention=attention,
        other_layers=tuple(others),
        problems=place.problems,
        bridge=None if (bridge := bridge_status()) is None else BridgeReport(*bridge),
    )


def _place(layers: Layers) -> _Place:
    shard = merge_layers(layers).shard
    problems = []
    try:
        env = RankEnvironment.detect()
    except EnvironmentMismatchError as exc:
        problems.append(f"{exc.message}; {exc.remedy}")
        env = RankEnvironment(0, 1, 0, 1, is_torchrun=False)
    try:
        device_type, reason = resolve_device(shard)
    except EnvironmentMismatchError as exc:
        problems.append(f"{exc.message}; {exc.remedy}")
        device_type, reason = shard.device, "as asked"
    try:
        device = device_of_rank(device_type, env, all_reduce=shard.all_reduce)
    except EnvironmentMismatchError as exc:
        problems.append(f"{exc.message}; {exc.remedy}")
        device = torch.device(device_type, env.local_rank)
    return _Place(env, device, reason, tuple(problems))


def _is_ours(origin: str) -> bool:
    return origin.startswith("inference_shardformer.")
