"""Preparing a model on all ranks: everything is decided and checked, and every rank decided the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from inference_shardformer.config.sources import Layers
from inference_shardformer.config.violations import ConfigViolations
from inference_shardformer.errors import ConfigError
from inference_shardformer.ranks import Ranks
from inference_shardformer.resolving.examination import ModelSource
from inference_shardformer.resolving.preparation import Prepared, agreed_facts, prepare, with_rank_verdicts

T = TypeVar("T")


def prepare_together(layers: Layers, ranks: Ranks, read: Callable[[], ModelSource]) -> Prepared:
    """Decide and check everything, on all ranks alike; raises what is wrong, the same on every rank."""
    prepared = _all_or_none(ranks, "preparation", lambda: prepare(layers, ranks, read))
    ranks.guard.agree("preparation", agreed_facts(prepared))
    prepared = ranks.guard.together("explanation", lambda: with_rank_verdicts(prepared, ranks))
    if torch.get_num_threads() != prepared.config.threads_per_rank:
        torch.set_num_threads(prepared.config.threads_per_rank)
    return prepared


def _all_or_none(ranks: Ranks, phase: str, fn: Callable[[], T]) -> T:
    """`guard.together`; ranks whose configuration is wrong in the same way keep their list of violations."""
    try:
        return ranks.guard.together(phase, fn)
    except ConfigError as exc:
        mine = exc.__cause__
        if isinstance(mine, ConfigViolations) and mine.message.startswith(exc.message):
            raise mine from None
        raise
