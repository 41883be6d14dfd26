"""AsyncEngine: an engine for the tasks of one event loop. A thread of its own steps it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from types import TracebackType

from inference_shardformer.distributed.records import FailureRecord
from inference_shardformer.engine.engine import InferenceEngine
from inference_shardformer.engine.intake import Prompt
from inference_shardformer.engine.outputs import StepStats, StreamChunk
from inference_shardformer.engine.sampling_params import SamplingParams
from inference_shardformer.engine.stepper import Entry, News, Stepper
from inference_shardformer.errors import InferenceShardformerError, QueueFullError, RankFailure, StateError

_MAX_QUEUE = 256


class TokenStream(AsyncIterator[StreamChunk]):
    """The chunks of one request as they come; the last one carries its `finish_reason`, or its error is raised.

    Closing it, leaving its `async with`, cancelling the task that waits for a chunk, or letting go of it aborts the
    request, unless it has finished.
    """

    def __init__(self, entry: Entry, arrivals: asyncio.Queue[News | RankFailure], give_up: Callable[[], None]) -> None:
        self._entry = entry
        self._arrivals = arrivals
        self._give_up = give_up
        self._chunks: list[StreamChunk] = []
        self._error: InferenceShardformerError | None = None
        self._is_over = False

    def __aiter__(self) -> TokenStream:
        return self

    async def __anext__(self) -> StreamChunk:
        while not self._chunks:
            if self._error is not None:
                error, self._error = self._error, None
                raise error
            if self._is_over:
                raise StopAsyncIteration
            try:
                self._take(await self._arrivals.get())
            except asyncio.CancelledError:
                self.close()
                raise
        return self._chunks.pop(0)

    def close(self) -> None:
        """Abort the request unless it has finished. Idempotent."""
        if not self._is_over:
            self._is_over = True
            self._chunks.clear()
            self._give_up()

    async def __aenter__(self) -> TokenStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def _take(self, arrival: News | RankFailure) -> None:
        if isinstance(arrival, RankFailure):
            self._error, self._is_over = arrival, True
            return
        self._chunks += [chunk for chunk in arrival.chunks if arrival.error is None or chunk.finish_reason is None]
        self._error, self._is_over = arrival.error, arrival.is_last


class AsyncEngine:
    """Generates for many tasks of one event loop at once; only rank 0 has one, the other ranks `engine.follow()`.

    While it runs its thread makes all steps. Other calls of the engine (`generate`, `update_config`, ...) work beside
    it, from threads that may wait; only `step` is not theirs. At most `max_queue` requests may wait beside the
    `scheduler.max_num_seqs` that may run. `on_step` is called on the stepping thread.

        async with AsyncEngine(engine) as async_engine:
            async for chunk in async_engine.generate("def f():", SamplingParams(max_new_tokens=8)):
                print(chunk.text, end="")
    """

    def __init__(
        self,
        engine: InferenceEngine,
        *,
        max_queue: int = _MAX_QUEUE,
        on_step: Callable[[StepStats], None] | None = None,
    ) -> None:
        if engine.rank != 0:
            raise StateError(f"AsyncEngine on rank {engine.rank}", remedy="call engine.follow() on every rank above 0")
        self._engine = engine
        self._max_queue = max_queue
        self._stepper = Stepper(engine, self, on_step=on_step)
        self._open: dict[Entry, asyncio.Queue[News | RankFailure]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_closing = False
        self._ended = asyncio.Event()
        self._is_quiet = asyncio.Event()
        self._is_quiet.set()
        self._failure: RankFailure | None = None

    @property
    def failure(self) -> RankFailure | None:
        """What ended the engine on all ranks, if something did."""
        return self._failure

    @property
    def is_accepting(self) -> bool:
        """Whether `generate` takes requests now."""
        return self._loop is not None and not self._is_closing and self._failure is None

    @property
    def num_unfinished(self) -> int:
        """Requests that wait or run."""
        return len(self._open)

    @property
    def max_unfinished(self) -> int:
        """How many requests may wait and run at once, by the configuration of now."""
        return self._engine.config.current.inference.scheduler.max_num_seqs + self._max_queue

    async def start(self) -> None:
        """Begin to step, for the event loop of this task."""
        if self._loop is not None:
            raise StateError("start() on an AsyncEngine that has been started", remedy="make one for each run")
        self._loop = asyncio.get_running_loop()
        self._stepper.start()

    async def validate(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> tuple[int, ...]:
        """The token ids with which a prompt would be queued, found on a thread; `RequestError` if it would not."""
        return await asyncio.to_thread(self._engine.validate, prompt, sampling_params)

    def generate(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, *, request_id: str | None = None
    ) -> TokenStream:
        """Queue one request and return its chunks, to be read with `async for`.

        Raises `QueueFullError` if as many wait as may, `RankFailure` once a rank has failed, `StateError` where nothing
        is accepted. An invalid request raises its `RequestError` from the first chunk on; `validate` tells before.
        """
        self.check_room(1)
        entry = Entry(prompt, SamplingParams() if sampling_params is None else sampling_params, request_id)
        arrivals: asyncio.Queue[News | RankFailure] = asyncio.Queue()
        self._open[entry] = arrivals
        self._is_quiet.clear()
        self._stepper.add(entry)
        return TokenStream(entry, arrivals, lambda: self._give_up(entry))

    def check_room(self, num_requests: int) -> None:
        """Raise what `generate` would if so many requests came now."""
        self._refuse_unless_accepting()
        if self.num_unfinished + num_requests > self.max_unfinished:
            raise QueueFullError(
                f"{num_requests} more than the {self.num_unfinished} requests that wait and run now, and no more than "
                f"{self.max_unfinished} may (scheduler.max_num_seqs and max_queue={self._max_queue})",
                remedy="try again later, send fewer at once, or raise one of the two",
            )

    async def wait_ended(self) -> RankFailure | None:
        """Wait until there are no more steps; what ended them, unless `stop` did."""
        await self._ended.wait()
        return self._failure

    def refuse(self) -> None:
        """Accept no more requests from now on."""
        self._is_closing = True

    async def drain(self, grace_s: float) -> None:
        """Accept no more; let what runs go on for so many seconds, then abort it, and wait for its end."""
        self.refuse()
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._is_quiet.wait(), grace_s)
        for entry in self._open:
            self._stepper.abort(entry)
        await self._is_quiet.wait()

    async def stop(self, *, grace_s: float = 0.0) -> None:
        """`drain`, then let the other ranks go and end the thread. Idempotent. Raises the failure of a rank."""
        if self._loop is None:
            return
        await self.drain(grace_s)
        self._stepper.end()
        await self._ended.wait()
        self._raise_failure()

    async def __aenter__(self) -> AsyncEngine:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            await self.stop()
        except RankFailure:
            if exc is None:
                raise

    def tell(self, news: list[News]) -> None:
        """Hand on what a step brought; called by the stepping thread."""
        self._call_in_loop(lambda: self._hand_on(news))

    def end(self, failure: RankFailure | None) -> None:
        """Note that there are no more steps; called by the stepping thread."""
        self._call_in_loop(lambda: self._note_end(failure))

    def _call_in_loop(self, work: Callable[[], None]) -> None:
        if self._loop is None or self._loop.is_closed():  # nobody is left who could ask for the end
            self._stepper.end()
        else:
            self._loop.call_soon_threadsafe(work)

    def _hand_on(self, news: list[News]) -> None:
        for piece in news:
            arrivals = self._open.pop(piece.entry, None) if piece.is_last else self._open.get(piece.entry)
            if arrivals is not None:
                arrivals.put_nowait(piece)
        self._note_if_quiet()

    def _note_end(self, failure: RankFailure | None) -> None:
        self._failure = failure
        self._ended.set()
        if failure is not None:
            for arrivals in self._open.values():
                arrivals.put_nowait(failure)
            self._open.clear()
        self._note_if_quiet()

    def _note_if_quiet(self) -> None:
        if not self._open:
            self._is_quiet.set()

    def _raise_failure(self) -> None:
        if self._failure is not None:  # another object each time: a traceback grows with every raise
            raise FailureRecord.of(self._failure, rank=0, phase="serving").to_error() from self._failure

    def _give_up(self, entry: Entry) -> None:
        self._stepper.give_up(entry)

    def _refuse_unless_accepting(self) -> None:
        self._raise_failure()
        if not self.is_accepting:
            why = "that stops" if self._is_closing else "that was not started"
            remedy = "ask another server" if self._is_closing else "enter it with `async with`, or await start()"
            raise StateError(f"generate() on an AsyncEngine {why}", remedy=remedy)
