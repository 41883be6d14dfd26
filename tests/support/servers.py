"""Starts `inference-shardformer serve` as a user does, and talks to it."""

from __future__ import annotations

import http.client
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import psutil

COMMAND = [sys.executable, "-m", "inference_shardformer.cli.main"]


@dataclass
class Server:
    """A running server, the processes it consists of, and the file that holds its standard error."""

    process: subprocess.Popen[str]
    url: str
    log: Path

    def request(self, method: str, path: str, body: object = None, **headers: str) -> tuple[int, bytes]:
        """Status and body of an answer."""
        address = urlsplit(self.url)
        connection = http.client.HTTPConnection(address.hostname, address.port, timeout=60)
        try:
            content = body if isinstance(body, bytes | None) else json.dumps(body)
            connection.request(method, path, content, headers)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def get(self, path: str) -> tuple[int, object]:
        """Status and JSON of an answer."""
        status, content = self.request("GET", path)
        return status, json.loads(content)

    def post(self, path: str, **body: object) -> tuple[int, dict]:
        """Status and JSON of an answer."""
        status, content = self.request("POST", path, body)
        return status, json.loads(content)

    def events(self, path: str, **body: object) -> list[object]:
        """The events of a stream, in JSON, without the last one, which must be [DONE]."""
        status, content = self.request("POST", path, {**body, "stream": True})
        assert status == 200, content
        *events, done, rest = content.decode().split("\n\n")
        assert (done, rest) == ("data: [DONE]", ""), content
        assert all(event.startswith("data: ") for event in events)
        return [json.loads(event.removeprefix("data: ")) for event in events]

    def metric(self, name: str, **labels: str) -> float:
        """A value of /metrics."""
        inside = ",".join(f'{key}="{value}"' for key, value in labels.items())
        pattern = rf"^inference_shardformer_{name}{re.escape('{' + inside + '}') if labels else ''} (\S+)$"
        return float(re.search(pattern, self.request("GET", "/metrics")[1].decode(), re.MULTILINE)[1])

    def ranks(self) -> list[psutil.Process]:
        """The processes of the ranks, by rank."""
        ranks = [process for process in psutil.Process(self.process.pid).children(recursive=True) if _rank(process)]
        return sorted(ranks, key=_rank)


def _rank(process: psutil.Process) -> str:
    return process.environ().get("RANK", "")


@contextmanager
def served(folder: Path, *options: object, command: list[str] | None = None, **environ: str) -> Iterator[Server]:
    """A server that is ready. Whatever is left of it in the end is killed."""
    log, out = folder / "server.err", folder / "server.out"
    words = [*(command or [*COMMAND, "serve"]), *map(str, options), "--port", "0", "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environ}
    with out.open("w") as stdout, log.open("w") as stderr:
        process = subprocess.Popen(words, stdout=stdout, stderr=stderr, text=True, env=environment, cwd=folder)
    try:
        until(lambda: out.read_text().endswith("\n") or process.poll() is not None, timeout_s=120)
        assert process.poll() is None, log.read_text()
        yield Server(process, json.loads(out.read_text().splitlines()[-1])["url"], log)
    finally:
        for left in _family(process):
            left.kill()
        process.wait()


def until(condition: Callable[[], object], *, timeout_s: float = 30.0) -> None:
    """Wait for a condition; fails when it does not come true."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.02)


def _family(process: subprocess.Popen[str]) -> list[psutil.Process]:
    try:
        parent = psutil.Process(process.pid)
        return [*parent.children(recursive=True), parent]
    except psutil.NoSuchProcess:
        return []
