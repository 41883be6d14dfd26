"""Stepper: the one thread that steps an engine, between requests that come and go."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Protocol

from inference_shardformer.distributed.records import FailureRecord
from inference_shardformer.engine.calls import Call
from inference_shardformer.engine.engine import InferenceEngine
from inference_shardformer.engine.intake import Prompt
from inference_shardformer.engine.outputs import StepStats, StreamChunk
from inference_shardformer.engine.sampling_params import SamplingParams
from inference_shardformer.errors import RankFailure, RequestError

_LONGEST_IDLE_S = 1.0
_IDLE_SHARE_OF_TIMEOUT = 0.25


class Entry:
    """A request on its way through a stepper. `call` is there once it is queued; the stepper's thread alone uses it."""

    def __init__(self, prompt: Prompt, params: SamplingParams, request_id: str | None) -> None:
        self.prompt = prompt
        self.params = params
        self.request_id = request_id
        self.is_given_up = False
        self.call: Call | None = None


class News:
    """What a step brought one request: chunks, and at its end perhaps an error."""

    __slots__ = ("chunks", "entry", "error", "is_last")

    def __init__(self, entry: Entry, chunks: list[StreamChunk], *, is_last: bool, error: RequestError | None) -> None:
        self.entry = entry
        self.chunks = chunks
        self.is_last = is_last
        self.error = error


class Reader(Protocol):
    """Who hears of what steps bring; called on the stepper's thread."""

    def tell(self, news: list[News]) -> None:
        """A step brought something."""

    def end(self, failure: RankFailure | None) -> None:
        """There are no more steps: as asked for, or because of a failure."""


class Stepper:
    """Steps while there is work. An idle one steps now and then: other ranks wait in their next step for rank 0.

    A rank that waits longer than `shard.timeout_s` takes rank 0 for stalled, so an idle step comes after a quarter of
    that, and after a second at most, so that the failure of another rank is noticed soon.
    """

    def __init__(
        self, engine: InferenceEngine, reader: Reader, *, on_step: Callable[[StepStats], None] | None = None
    ) -> None:
        self._engine = engine
        self._reader = reader
        self._on_step = on_step
        self._idle_s = min(_LONGEST_IDLE_S, engine.config.current.config.shard.timeout_s * _IDLE_SHARE_OF_TIMEOUT)
        self._inbox: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._entries: list[Entry] = []
        self._untold: list[News] = []
        self._is_ending = False
        self._thread = threading.Thread(target=self._run, name="engine-stepper", daemon=True)

    def start(self) -> None:
        """Begin to step."""
        self._thread.start()

    def add(self, entry: Entry) -> None:
        """Queue a request before the next step. Any thread may call this."""
        self._inbox.put(lambda: self._begin(entry))

    def give_up(self, entry: Entry) -> None:
        """Abort a request before the next step; nothing more is told about it. Any thread may call this."""
        entry.is_given_up = True
        self._inbox.put(lambda: self._abort(entry))

    def abort(self, entry: Entry) -> None:
        """Abort a request before the next step; its last chunk says so. Any thread may call this."""
        self._inbox.put(lambda: self._abort(entry))

    def end(self) -> None:
        """End after the present step, and let the ranks go that follow."""
        self._inbox.put(self._note_end)

    def _run(self) -> None:
        failure: RankFailure | None = None
        try:
            while not self._is_ending:
                self._take_in()
                self._engine.step(on_step=self._on_step)
                self._tell()
            self._engine.dismiss()
        except Exception as exc:  # noqa: BLE001 - the end of the thread, where an error becomes that of every request
            failure = FailureRecord.of(exc, rank=self._engine.rank, phase="serving").to_error()
            failure.__cause__ = exc
        self._reader.end(failure)

    def _take_in(self) -> None:
        """Do what others asked for. Without requests this waits for somebody to ask."""
        try:
            self._inbox.get(block=not self._entries and not self._engine.has_unfinished(), timeout=self._idle_s)()
            while True:
                self._inbox.get_nowait()()
        except Empty:
            return

    def _begin(self, entry: Entry) -> None:
        if entry.is_given_up:
            self._untold.append(News(entry, [], is_last=True, error=None))
            return
        try:
            entry.call = self._engine.add_stream(entry.prompt, entry.params, request_id=entry.request_id)
        except RequestError as error:
            self._untold.append(News(entry, [], is_last=True, error=error))
            return
        (entry.request_id,) = entry.call.request_ids
        self._entries.append(entry)

    def _abort(self, entry: Entry) -> None:
        if entry.call is not None and entry.call.is_open and entry.request_id is not None:
            self._engine.abort(entry.request_id)

    def _note_end(self) -> None:
        self._is_ending = True

    def _tell(self) -> None:
        news, self._untold = self._untold, []
        for entry in self._entries:
            call = entry.call
            if call is None or not (call.chunks or not call.is_open):
                continue
            chunks = list(call.chunks)
            call.chunks.clear()
            error = None if call.is_open else call.outputs[0].error
            news.append(News(entry, chunks, is_last=not call.is_open, error=error))
        self._entries = [entry for entry in self._entries if entry.call is not None and entry.call.is_open]
        if news:
            self._reader.tell(news)
