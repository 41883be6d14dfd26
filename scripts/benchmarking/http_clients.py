"""Streaming clients of a server, as lean as can be: they share the processor with it."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass
from urllib.parse import urlsplit

from benchmarking.workloads import Workload

_USAGE = b'"usage":{"'


@dataclass
class Answer:
    """When the request was sent and when its events came, in seconds of one clock; tokens as the server counts them."""

    sent: float
    arrivals: list[float]
    num_tokens: int

    @property
    def first_s(self) -> float:
        """From the request to the first event."""
        return self.arrivals[0] - self.sent

    @property
    def gaps_s(self) -> list[float]:
        """Between two events."""
        return [later - sooner for sooner, later in zip(self.arrivals, self.arrivals[1:], strict=False)]


def send_all(url: str, model: str, work: Workload) -> tuple[float, list[Answer]]:
    """Send all requests at once, each over a connection of its own; the seconds until all were answered."""
    return asyncio.run(_send_all(url, model, work))


async def _send_all(url: str, model: str, work: Workload) -> tuple[float, list[Answer]]:
    began = time.perf_counter()
    requests = zip(work.prompts, work.max_new_tokens, strict=True)
    answers = await asyncio.gather(*(_send(url, model, prompt, length) for prompt, length in requests))
    return time.perf_counter() - began, answers


async def _send(url: str, model: str, prompt: list[int], max_new_tokens: int) -> Answer:
    body = {"model": model, "prompt": prompt, "max_tokens": max_new_tokens, "ignore_eos": True, "temperature": 0}
    options = {"stream": True, "stream_options": {"include_usage": True}}
    content = json.dumps(body | options).encode()
    address = urlsplit(url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\nConnection: close\r\n\r\n"
    sent = time.perf_counter()
    writer.write(head.encode() + content)
    arrivals, num_tokens = [], 0
    while line := await reader.readline():
        if not line.startswith(b"data: {"):
            continue
        if _USAGE in line:
            num_tokens = json.loads(line[6:])["usage"]["completion_tokens"]
        else:
            arrivals.append(time.perf_counter())
    writer.close()
    if not arrivals:
        raise SystemExit("the server sent no event: run it by hand to see why")
    return Answer(sent, arrivals, num_tokens)
