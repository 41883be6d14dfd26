"""Answers of the generating routes: one JSON object, or server-sent events as tokens come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from inference_shardformer.errors import InferenceShardformerError
from inference_shardformer.serving.api_error import ApiError, json_bytes, json_response
from inference_shardformer.serving.disconnect import ClientLeftError, while_connected
from inference_shardformer.serving.formats import Format, Text
from inference_shardformer.serving.generation import Generation

DONE = b"data: [DONE]\n\n"
_CLIENT_LEFT = 499  # nobody reads it; the metrics tell


class Answer(NamedTuple):
    """What is generated, and how it is told."""

    generation: Generation
    format: Format


def sse_event(content: object) -> bytes:
    """One server-sent event. JSON has no line breaks of its own, so it is one line of data."""
    return b"data: " + json_bytes(content) + b"\n\n"


async def whole_answer(request: Request, answer: Answer) -> Response:
    """The answer once all is generated; a client that leaves before ends what it asked for."""
    try:
        return json_response(await while_connected(request.receive, _collected(answer)))
    except ClientLeftError:
        return Response(status_code=_CLIENT_LEFT)


class EventStream(Response):
    """The answer as events. An error in its midst is its last event; a client that leaves ends what it asked for."""

    media_type = "text/event-stream"

    def __init__(self, answer: Answer) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send all events."""
        try:
            await while_connected(receive, self._send_all(send))
        except ClientLeftError:
            return

    async def _send_all(self, send: Send) -> None:
        generation, form = self._answer
        try:
            async with generation:
                await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
                await _send(send, form.opening(generation.num_prompts))
                async for index, chunk in generation.chunks():
                    await _send(send, form.pieces(index, Text(chunk.text, chunk.finish_reason, chunk.logprobs)))
                await _send(send, form.closing(usage(generation)), last=DONE)
        except InferenceShardformerError as error:
            await _send(send, [ApiError.of(error).to_json()])
        except ApiError as error:
            await _send(send, [error.to_json()])
        await send({"type": "http.response.body", "body": b""})


def usage(generation: Generation) -> dict[str, int]:
    """What a request has cost."""
    return {
        "prompt_tokens": generation.num_prompt_tokens,
        "completion_tokens": generation.num_tokens,
        "total_tokens": generation.num_prompt_tokens + generation.num_tokens,
    }


async def _collected(answer: Answer) -> dict[str, object]:
    generation, form = answer
    async with generation:
        texts = [Text("", None)] * generation.num_prompts
        async for index, chunk in generation.chunks():
            texts[index] = texts[index].with_piece(Text(chunk.text, chunk.finish_reason, chunk.logprobs))
        return form.whole(texts, usage(generation))


async def _send(send: Send, events: Sequence[dict[str, object]], *, last: bytes = b"") -> None:
    body = b"".join(map(sse_event, events)) + last
    if body:
        await send({"type": "http.response.body", "body": body, "more_body": True})
