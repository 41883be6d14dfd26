"""simulate: runs a function on several ranks of one process, one at a time, so that a debugger can follow them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, TypeVar, cast

import torch

from inference_shardformer.config.inference import InferenceConfig
from inference_shardformer.config.shard import ShardConfig
from inference_shardformer.distributed.simulated.errors import DeadlockError
from inference_shardformer.distributed.simulated.reduction import ReductionOrder
from inference_shardformer.distributed.simulated.seat import SimulatedSeat
from inference_shardformer.distributed.simulated.turns import Turns
from inference_shardformer.errors import ConfigError, RankFailure
from inference_shardformer.shardformer import InferenceShardformer

if TYPE_CHECKING:
    import torch.distributed as dist

    from inference_shardformer.config.sources import ConfigSources

T = TypeVar("T")


@dataclass(frozen=True)
class SimulatedRank:
    """What the function of a simulation is given: which rank it plays, and the way to its shardformer.

    `process_group` stands for this rank wherever one of ours asks for a process group.
    """

    tp_rank: int
    tp_size: int
    process_group: SimulatedSeat

    def shardformer(
        self,
        shard_config: ShardConfig | None = None,
        inference_config: InferenceConfig | None = None,
        *,
        sources: ConfigSources | None = None,
    ) -> InferenceShardformer:
        """An `InferenceShardformer` of this rank; its `tp_size` is that of the simulation, its device a CPU."""
        given = ShardConfig() if shard_config is None else shard_config
        values = {"tp_size": self.tp_size, "device": "cpu", **given.model_dump(exclude_unset=True)}
        group = cast("dist.ProcessGroup", self.process_group)
        return InferenceShardformer(ShardConfig(**values), inference_config, process_group=group, sources=sources)


@dataclass
class _Run(Generic[T]):
    """How each rank ended."""

    results: dict[int, T] = field(default_factory=dict)
    errors: dict[int, BaseException] = field(default_factory=dict)


def simulate(tp_size: int, fn: Callable[[SimulatedRank], T], *, order: ReductionOrder = "gloo") -> list[T]:
    """Run `fn` on `tp_size` ranks, each a thread of this process; what it returned, in rank order.

    One rank runs at a time, and the next takes over where a rank waits in a collective, always in the same order: what
    is printed, and where a debugger stops, is the same in every run. Rank 0 is the calling thread, so that pdb works
    in a notebook. Sums over ranks are rounded as gloo's are, or with `order="shm"` as those through shared memory.

    Raises what a rank raised (that of the lowest one which failed by itself), and `DeadlockError`, with the Python
    stack of every rank that waits, when the ranks can never meet.
    """
    if tp_size < 1:
        raise ConfigError(f"tp_size={tp_size} ranks cannot be simulated", remedy="ask for tp_size >= 1")
    if order not in ("gloo", "shm"):
        raise ConfigError(f"order={order!r} is not known", remedy="choose 'gloo' or 'shm'")
    turns, run, num_threads = Turns(tp_size), _Run[T](), torch.get_num_threads()

    def play(rank: int) -> None:
        how = "has ended"
        try:
            turns.begin(rank)
            run.results[rank] = fn(SimulatedRank(rank, tp_size, SimulatedSeat(turns, rank, order=order)))
        except BaseException as exc:  # noqa: BLE001 - raised again by the calling thread
            run.errors[rank] = exc
            how = f"has ended with {type(exc).__name__}: {str(exc).partition(chr(10))[0]}"
        finally:
            turns.end(rank, how)

    others = [
        threading.Thread(target=play, args=(rank,), name=f"rank-{rank}", daemon=True) for rank in range(1, tp_size)
    ]
    for thread in others:
        thread.start()
    play(0)
    for thread in others:
        thread.join()
    torch.set_num_threads(num_threads)
    if run.errors:
        raise run.errors[_culprit(run.errors)]
    return [run.results[rank] for rank in range(tp_size)]


def _culprit(errors: dict[int, BaseException]) -> int:
    """The lowest rank that failed by itself; one that heard of another's failure did not."""

    def is_echo(rank: int) -> bool:
        error = errors[rank]
        is_of_another = isinstance(error, RankFailure) and error.rank != rank
        return isinstance(error, DeadlockError) or (is_of_another and error.__cause__ is None)

    return min(errors, key=lambda rank: (is_echo(rank), rank))
