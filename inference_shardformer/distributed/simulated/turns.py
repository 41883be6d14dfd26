"""Turns: threads that play ranks, of which one runs at a time; the turn passes where ranks meet.

rank 0 ──runs──▶ meets ........................................ ▶ runs on
rank 1           ..........▶ runs ──▶ meets ................... ▶ (when rank 0 meets again, or ends)
rank 2                                ......▶ runs ──▶ meets ─▶ all are here: the results are made, rank 0 runs on
"""

from __future__ import annotations

import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from inference_shardformer.distributed.simulated.errors import DeadlockError
from inference_shardformer.errors import InferenceShardformerError

_SHOWN_FRAMES = 14
MakeError = Callable[[], InferenceShardformerError]
Combine = Callable[[list[object]], Sequence[object]]


@dataclass
class Place:
    """Where the ranks of one group meet. `error` is why nobody can meet there any more."""

    here: dict[int, tuple[str, object]] = field(default_factory=dict)  # rank -> what it entered, what it brings
    results: dict[int, object] = field(default_factory=dict)
    error: MakeError | None = None


class Turns:
    """Whose turn it is among `size` threads, and what the ones that wait are waiting for."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._changed = threading.Condition()
        self._current = 0
        self._ended: dict[int, str] = {}
        self._places: list[Place] = []
        self._threads: dict[int, int] = {}

    def place(self, number: int) -> Place:
        """The meeting place of the group that each rank joined as its `number`-th, from 0."""
        with self._changed:
            while len(self._places) <= number:
                self._places.append(Place())
            return self._places[number]

    def begin(self, rank: int) -> None:
        """The calling thread plays `rank` from now on; returns when its turn comes."""
        with self._changed:
            self._threads[rank] = threading.get_ident()
            self._wait_for_turn(rank)

    def end(self, rank: int, how: str) -> None:
        """The rank does not come back; `how` completes the sentence "rank n ..."."""
        with self._changed:
            self._ended[rank] = how
            if self._current == rank:
                self._pass_on(rank)

    def meet(self, place: Place, rank: int, what: str, brings: object, combine: Combine) -> object:
        """Wait until every rank has entered the same `what`; `combine` makes every rank's result of what they bring.

        Raises DeadlockError when that cannot happen, or whatever `fail` was given.
        """
        with self._changed:
            _raise_error(place)
            place.here[rank] = (what, brings)
            if len(place.here) < self.size:
                self._pass_on(rank)
            elif len({what for what, _ in place.here.values()}) > 1:
                self._find_deadlock()
            else:
                made = combine([place.here[each][1] for each in range(self.size)])
                place.results = dict(enumerate(made))
                place.here.clear()
                self._give(0)
            try:
                self._wait_for_turn(rank)
            except BaseException:  # Ctrl-C reaches the rank that runs on the main thread
                place.here.pop(rank, None)
                raise
            if rank not in place.results:
                _raise_error(place)
            return place.results.pop(rank)

    def fail(self, place: Place, make_error: MakeError) -> InferenceShardformerError:
        """Nobody meets at the place any more: every rank raises this error there. The first one counts; returns it."""
        with self._changed:
            if place.error is None:
                place.error = make_error
            return place.error()

    def _wait_for_turn(self, rank: int) -> None:
        self._changed.wait_for(lambda: self._current == rank)

    def _give(self, rank: int) -> None:
        self._current = rank
        self._changed.notify_all()

    def _pass_on(self, rank: int) -> None:
        """Give the turn to the next rank that can run; with none left, those that wait learn that it is in vain."""
        order = [(rank + step) % self.size for step in range(1, self.size + 1)]
        able = [each for each in order if each not in self._ended and self._can_run(each)]
        if able:
            self._give(able[0])
        elif len(self._ended) < self.size:
            self._find_deadlock()

    def _can_run(self, rank: int) -> bool:
        return all(rank not in place.here or place.error is not None for place in self._places)

    def _find_deadlock(self) -> None:
        """Fail every place where somebody waits, and let the first of them raise."""
        open_places = [place for place in self._places if place.error is None]
        waiting = {rank: f"is in {what}" for place in open_places for rank, (what, _) in place.here.items()}
        stacks = {rank: self._stack(rank) for rank in waiting}
        odd = _odd_one_out({**waiting, **self._ended})
        phase = waiting.get(odd, "is in a collective").removeprefix("is in ")
        told = {**waiting, **self._ended}
        for place in open_places:
            if place.here:
                place.error = partial(DeadlockError, rank=odd, phase=phase, waiting=told, stacks=stacks)
        self._give(min(waiting))

    def _stack(self, rank: int) -> str:
        """The Python stack of a rank that waits, without the frames that do the waiting."""
        frame = sys._current_frames().get(self._threads[rank])
        frames = [entry for entry in traceback.extract_stack(frame) if __package__ not in _module_path(entry.filename)]
        return "".join(traceback.format_list(frames[-_SHOWN_FRAMES:]))


def _raise_error(place: Place) -> None:
    if place.error is not None:
        raise place.error()


def _odd_one_out(told: dict[int, str]) -> int:
    """The rank that does what the fewest others do; the lowest of several."""
    counts = {what: list(told.values()).count(what) for what in told.values()}
    return min(told, key=lambda rank: (counts[told[rank]], -rank))


def _module_path(filename: str) -> str:
    return filename.replace("/", ".").replace("\\", ".")
