"""Calls an ASGI application in this process, without connections."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class Answered:
    """What an application sent; `bodies` has one entry for each message."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    bodies: list[bytes] = field(default_factory=list)

    @property
    def content(self) -> object:
        """The JSON of the whole body."""
        return json.loads(b"".join(self.bodies))

    @property
    def events(self) -> list[str]:
        """The data of all events."""
        *events, rest = b"".join(self.bodies).decode().split("\n\n")
        assert rest == ""
        assert all(event.startswith("data: ") for event in events), events
        return [event.removeprefix("data: ") for event in events]


async def call(
    app: Callable,
    method: str,
    path: str,
    body: object = None,
    *,
    headers: dict[str, str] | None = None,
    leave_after: int | None = None,
) -> Answered:
    """Send one request. The client hangs up after `leave_after` messages of the application, or at the end."""
    answered, leaving = Answered(), asyncio.Event()
    content = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    half = len(content) // 2
    pieces = [
        {"type": "http.request", "body": content[:half], "more_body": True},
        {"type": "http.request", "body": content[half:]},
    ]

    async def receive() -> dict:
        if pieces:
            return pieces.pop(0)
        await leaving.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict) -> None:
        if message["type"] == "http.response.start":
            answered.status = message["status"]
            answered.headers = {name.decode(): value.decode() for name, value in message["headers"]}
        elif message.get("body"):
            answered.bodies.append(message["body"])
        if leave_after is not None and len(answered.bodies) >= leave_after:
            leaving.set()

    path, _, query = path.partition("?")
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "headers": [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
    }
    if leave_after == 0:
        leaving.set()
    await app(scope, receive, send)
    return answered
