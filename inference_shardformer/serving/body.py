"""Reads the body of a request as one JSON object, within limits."""

from __future__ import annotations

import json
from typing import NoReturn

from starlette.requests import Request

from inference_shardformer.serving.api_error import ApiError

MAX_BODY_BYTES = 16 * 2**20


async def read_object(request: Request) -> dict[str, object]:
    """The JSON object that a client sent. Raises `ApiError`: 413 for one that is too large, 400 for anything else."""
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > MAX_BODY_BYTES:
            raise ApiError(
                413,
                f"the request has more than {MAX_BODY_BYTES} bytes",
                remedy="send fewer prompts in one request",
                code="request_too_large",
            )
    try:
        content = json.loads(bytes(body), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as exc:
        raise ApiError(
            400, f"the body is not JSON: {exc}", remedy="send one JSON object, in UTF-8", code="invalid_json"
        ) from exc
    if not isinstance(content, dict):
        raise ApiError(
            400,
            f"the body is a JSON {type(content).__name__}, not an object",
            remedy='send an object, such as {"model": "...", "prompt": "..."}',
            code="invalid_json",
        )
    return content


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")
