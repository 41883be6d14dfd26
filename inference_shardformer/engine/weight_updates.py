"""WeightUpdates: new weights for a running engine, between two steps and on every rank."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch

from inference_shardformer.engine.events import EventExchange, UpdateWeights
from inference_shardformer.engine.weight_stream import WeightGroup, WeightRefusal, WeightStream, WeightWriter, check
from inference_shardformer.errors import CheckpointError, InferenceShardformerError, RankFailure, StateError

_log = logging.getLogger(__name__)

Weights = Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]]
_REMEDY = "give weights by the names and in the shapes of the unsharded model's state_dict()"
_PARTLY_NEW = "the weights are partly new: load them again, and attach the model again"
_SHOWN = 4


@dataclass(eq=False)
class WeightUpdate:
    """One update. `error` is set once it was refused, and then nothing has changed; else `num_tensors` were stored."""

    weights: Weights
    num_tensors: int = 0
    error: InferenceShardformerError | None = None


class WeightUpdates:
    """Takes updates in between two steps, and settles them at the boundary. Its owner holds the engine's lock.

    A mapping is checked as a whole before anything changes, items of an iterator one by one. Whatever is wrong before
    the first change is a refusal by all ranks; a failure after it ends the engine on all of them, by name.
    `on_change` is told once there are new weights.
    """

    def __init__(
        self,
        writer: WeightWriter | None,
        *,
        group: WeightGroup,
        exchange: EventExchange,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self._writer = writer
        self._on_change = on_change
        self._group = group
        self._exchange = exchange
        self._waiting: WeightUpdate | None = None

    def request(self, weights: Weights) -> WeightUpdate:
        """Take an update in. Raises `CheckpointError` for what is wrong with a mapping; with one rank it is done."""
        problem = _problem_of(weights, self._known())
        if problem:
            raise CheckpointError(problem, remedy=_REMEDY)
        update = WeightUpdate(weights)
        if self._group.size == 1:
            self._perform(update)
            return update
        self._waiting = update
        if self._group.rank == 0:
            self._exchange.post(UpdateWeights())
        return update

    def settle(self) -> None:
        """What rank 0 asked for takes effect on every rank, or on none; every rank must be here at the same time."""
        update, self._waiting = self._waiting or WeightUpdate({}), None
        self._perform(update)
        if update.error is not None and self._group.rank == 0:
            _log.warning("the update of the weights was given up: %s", update.error.message)

    def drop_unshared(self) -> None:
        """Give up what this rank asked for and rank 0 did not."""
        if self._waiting is None or self._group.rank == 0:
            return
        self._waiting.error = StateError(
            f"rank {self._group.rank} asked for new weights, and rank 0 did not, or refused them",
            remedy="make the same call on every rank, or on rank 0 alone while the others step()",
        )
        self._waiting = None

    def _perform(self, update: WeightUpdate) -> None:
        """Store item by item what all ranks agree on."""
        stream = WeightStream(update.weights, self._known(), self._group)
        try:
            while stream.step():
                pass
        except WeightRefusal as found:
            if stream.num_stored:
                raise RankFailure(
                    rank=found.rank, phase="weight update", cause=found.problem, remedy=_PARTLY_NEW
                ) from found.__cause__
            update.error = CheckpointError(str(found), remedy=_REMEDY)
        update.num_tensors = stream.num_stored
        if update.num_tensors:
            self._on_change()

    def _known(self) -> WeightWriter:
        if self._writer is None:
            raise StateError(
                "update_weights() on an engine that was built without a WeightWriter",
                remedy="let InferenceShardformer.attach() build the engine",
            )
        return self._writer


def _problem_of(weights: Weights, writer: WeightWriter) -> str:
    """Everything that is wrong with a mapping; of an iterator nothing is known yet."""
    if not isinstance(weights, Mapping):
        return ""
    problems = [found for name, tensor in weights.items() if (found := check(name, tensor, writer))]
    for name, tensor in weights.items() if not problems else ():
        owner = writer.canonical(name)
        if not torch.equal(weights.get(owner, tensor), tensor):
            problems.append(f"{name} is tied to {owner}, and they were given different values")
    more = f" (and {len(problems) - _SHOWN} more)" if len(problems) > _SHOWN else ""
    return "; ".join(problems[:_SHOWN]) + more
