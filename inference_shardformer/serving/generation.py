"""Generation: the streams of one HTTP request, one for each of its prompts, read as one and measured."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from time import perf_counter
from types import TracebackType

from inference_shardformer import AsyncEngine, SamplingParams
from inference_shardformer.engine.async_engine import TokenStream
from inference_shardformer.engine.outputs import StreamChunk
from inference_shardformer.errors import InferenceShardformerError
from inference_shardformer.serving.api_error import ApiError
from inference_shardformer.serving.metrics import Metrics


class Generation:
    """Generates for every prompt (valid token ids) as soon as it is made; leaving its `async with` aborts the rest.

    Raises `QueueFullError` unless all of them may be queued.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        *,
        metrics: Metrics,
        started: float,
    ) -> None:
        """`started` is when the request came, in `perf_counter` seconds."""
        self.num_prompt_tokens = sum(map(len, prompts))
        self.num_tokens = 0
        self._metrics = metrics
        self._started = started
        self._last: dict[int, float] = {}
        self._open = {index: len(prompt) for index, prompt in enumerate(prompts)}
        self._streams: list[TokenStream] = []
        try:
            for prompt in prompts:
                self._streams.append(engine.generate(prompt, params))
        except BaseException:
            for stream in self._streams:
                stream.close()
            raise

    @property
    def num_prompts(self) -> int:
        """How many texts are generated."""
        return len(self._streams)

    async def chunks(self) -> AsyncIterator[tuple[int, StreamChunk]]:
        """The chunks of all prompts as they come, with the index of the prompt.

        Raises the error of a request that cannot go on; 503 where the server stopped it.
        """
        if self.num_prompts == 1:
            async for chunk in self._streams[0]:
                self._note(0, chunk)
                yield 0, chunk
            return
        async for index, chunk in _merged(self._streams):
            self._note(index, chunk)
            yield index, chunk

    async def __aenter__(self) -> Generation:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for stream in self._streams:
            stream.close()
        for index in list(self._open):
            self._end(index, "error" if isinstance(exc, InferenceShardformerError) else "abort")

    def _note(self, index: int, chunk: StreamChunk) -> None:
        now = perf_counter()
        if chunk.token_ids:
            self.num_tokens += len(chunk.token_ids)
            seconds = now - self._last.get(index, self._started)
            self._metrics.note_tokens(len(chunk.token_ids), seconds, are_first=index not in self._last)
            self._last[index] = now
        if chunk.finish_reason == "abort":
            raise _stopped()
        if chunk.finish_reason is not None:
            self._end(index, chunk.finish_reason)

    def _end(self, index: int, reason: str) -> None:
        seconds = perf_counter() - self._started
        self._metrics.note_end(reason, num_prompt_tokens=self._open.pop(index), seconds=seconds)


async def _merged(streams: Sequence[TokenStream]) -> AsyncIterator[tuple[int, StreamChunk]]:
    """The chunks of several streams as they come, with the index of the stream."""
    waiting = {asyncio.ensure_future(anext(stream)): index for index, stream in enumerate(streams)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                index, chunk = waiting.pop(task), task.result()
                if chunk.finish_reason is None:
                    waiting[asyncio.ensure_future(anext(streams[index]))] = index
                yield index, chunk
    finally:
        for task in waiting:
            task.cancel()


def _stopped() -> ApiError:
    return ApiError(
        503, "the server stops and has ended this request", remedy="send it to another server", code="stopping"
    )
