"""The way back from a sharded model on all ranks: restored in memory, or saved for Hugging Face or for these ranks."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from inference_shardformer.errors import CheckpointError, RankFailure, StateError
from inference_shardformer.ranks import Ranks
from inference_shardformer.resolving.preparation import Prepared
from inference_shardformer.sharded import Reversal, Sharded, shard_model
from inference_shardformer.sharding.gather import can_hold, compute_dtype
from inference_shardformer.sharding.plan_file import PlanFile
from inference_shardformer.sharding.save import max_bytes, save_gathered, save_rank
from inference_shardformer.sharding.sharder import ModulePlacer, place_planned
from inference_shardformer.sharding.unshard import Original, check_reversible, unshard_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LOGGER = logging.getLogger(__name__)


def shard(
    prepared: Prepared,
    ranks: Ranks,
    model: PreTrainedModel,
    *,
    must_be_reversible: bool,
    place: ModulePlacer = place_planned,
) -> Sharded:
    """Shard a model in memory on all ranks; where that ends half way, it is restored.

    That needs every rank alive, and a compute type that holds the model's values.
    """
    reversal = Reversal()
    try:
        return ranks.guard.together(
            "sharding",
            lambda: shard_model(prepared, ranks, model, reversal, must_be_reversible=must_be_reversible, place=place),
        )
    except Exception:
        with suppress(RankFailure):  # of a rank that has ended, and with it its part
            ranks.guard.together("restoring", lambda: _recover(prepared, model, ranks, reversal))
        raise


def check(prepared: Prepared, sharded: Sharded) -> None:
    """Raise `StateError` where the sharded model cannot become again what it was."""
    is_quantized = prepared.config.inference.weights.quantization is not None
    check_reversible(sharded.original.tensors, prepared.config.torch_dtype, is_quantized=is_quantized)


def unshard(prepared: Prepared, sharded: Sharded, ranks: Ranks, *, everywhere: bool) -> None:
    """Make the sharded model the Hugging Face model again that it was, or would have been; in place, on all ranks."""
    config, original = prepared.config, sharded.original
    in_memory = not next(iter(original.snapshot.parameters)).is_meta
    unshard_model(
        sharded.model, original, ranks.group, dtype=config.torch_dtype, everywhere=everywhere, in_memory=in_memory
    )
    if not in_memory:
        original.snapshot.fill_meta(_without_weights(sharded.model), ranks.device)


def _recover(prepared: Prepared, model: PreTrainedModel, ranks: Ranks, reversal: Reversal) -> None:
    """Restore a model whose sharding ended half way: from what a rank still holds whole, else from all ranks' parts."""
    told = ranks.group.all_gather_bytes(b"" if reversal.original is None else b"begun")
    if not all(told) or reversal.original is None or reversal.source is None:
        return  # nothing was changed on this rank, or some rank has no part to give
    dtype, held = prepared.config.torch_dtype, reversal.source.held
    is_quantized = prepared.config.inference.weights.quantization is not None
    try:
        check_reversible(reversal.original.tensors, dtype, is_quantized=is_quantized)
    except StateError as exc:
        _LOGGER.warning("the model that was being sharded is not restored: %s", exc.message)
        return
    unshard_model(model, reversal.original, ranks.group, dtype=dtype, everywhere=True, in_memory=True, held=held)


def save_pretrained(
    prepared: Prepared, sharded: Sharded, ranks: Ranks, folder: Path, max_shard_size: int | str
) -> None:
    """Gather a checkpoint that Hugging Face loads; rank 0 writes it."""
    dtype = prepared.config.torch_dtype
    _refuse_quantized(prepared)
    if ranks.group.rank == 0:
        _make(folder)
        _write_configs(sharded.model, sharded.original, folder, _written_dtype(sharded, dtype))
    save_gathered(
        sharded.model,
        sharded.original,
        ranks.group,
        folder,
        dtype=dtype,
        keeps_types=not sharded.has_new_weights,
        max_file_bytes=max_bytes(max_shard_size),
    )


def save_sharded(prepared: Prepared, sharded: Sharded, ranks: Ranks, folder: Path) -> None:
    """Write the part of every rank, and on rank 0 what belongs to all of them."""
    dtype = prepared.config.torch_dtype
    _refuse_quantized(prepared)
    plans, tensors = sharded.original.plans, sharded.original.tensors
    _make(folder)
    if ranks.group.rank == 0:
        _write_configs(sharded.model, sharded.original, folder, dtype)
    plan_file = PlanFile.of(plans, tensors, policy=prepared.policy.name)
    save_rank(sharded.model, sharded.plan, plan_file, folder, dtype=dtype)


def _refuse_quantized(prepared: Prepared) -> None:
    if prepared.config.inference.weights.quantization is not None:
        raise CheckpointError(
            "quantised weights are not saved: their values are no longer those of the checkpoint",
            remedy="save from an engine without inference.weights.quantization",
        )


def _written_dtype(sharded: Sharded, dtype: torch.dtype) -> torch.dtype:
    """The type that config.json names: that of most tensors as they are written."""
    if sharded.has_new_weights:
        return dtype
    kinds = [compute_dtype(info) for info in sharded.original.tensors.values()]
    kinds = [kind if can_hold(dtype, kind) else dtype for kind in kinds]
    return max(set(kinds), key=kinds.count)


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise CheckpointError(f"{folder}: cannot be made: {exc.strerror}", remedy="give another folder") from exc


def _write_configs(model: PreTrainedModel, original: Original, folder: Path, dtype: torch.dtype) -> None:
    """config.json and generation_config.json, as `save_pretrained` of the unsharded model would write them."""
    config = copy.copy(model.config)
    vars(config).update(original.snapshot.values_of(model.config))
    config.architectures = [type(model).__name__]
    vars(config).pop("_attn_implementation_autoset", None)  # a note of transformers 4.51 to itself
    setattr(config, "dtype" if hasattr(config, "dtype") else "torch_dtype", str(dtype).removeprefix("torch."))
    try:
        config.save_pretrained(folder)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(folder)
    except (OSError, ValueError) as exc:
        raise CheckpointError(f"{folder}: the configuration cannot be written: {exc}", remedy="see the cause") from exc


def _without_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A new model of the same configuration whose buffers have values; its parameters are on the meta device."""
    with torch.random.fork_rng(devices=[]), _parameters_on_meta():
        return type(model)(model.config)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules that are made meanwhile put their parameters, not their buffers, on the meta device."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
