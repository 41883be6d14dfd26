"""Serves an application over a socket until a signal, or the failure of a rank, ends it."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import uvicorn
from starlette.types import ASGIApp

from inference_shardformer import AsyncEngine, InferenceEngine, InferenceShardformer
from inference_shardformer.errors import EnvironmentMismatchError, RankFailure
from inference_shardformer.serving.app import build_app
from inference_shardformer.serving.chat_template import ChatTemplate
from inference_shardformer.serving.metrics import Metrics
from inference_shardformer.serving.service import Service
from inference_shardformer.serving.signals import StopSignals
from inference_shardformer.serving.token_texts import TokenTexts

_LINGER_S = 1.0  # after a failure: time for clients and probes to read why
_SEND_S = 2  # time for clients to read the rest of their answers
_BACKLOG = 2048


@dataclass(frozen=True)
class Settings:
    """What a server may be told beside the configuration of its engine."""

    models: tuple[str, ...]
    api_keys: tuple[str, ...] = ()
    chat_template: str | None = None
    max_queue: int = 256
    grace_s: float = 5.0


class _Server(uvicorn.Server):
    """uvicorn without its handling of signals, which is ours."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals alone."""
        yield


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens to nobody yet; port 0 takes a free one. Raises `EnvironmentMismatchError`."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as exc:
        raise EnvironmentMismatchError(
            f"cannot listen on --host {host} --port {port}: {exc}",
            remedy="choose another port (0 takes a free one), or an address of this machine",
        ) from exc
    return bound


def url_of(bound: socket.socket) -> str:
    """Where clients find the server."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def serve_engine(
    shardformer: InferenceShardformer,
    engine: InferenceEngine,
    bound: socket.socket,
    settings: Settings,
    *,
    on_ready: Callable[[], None] = lambda: None,
) -> signal.Signals:
    """Serve what an engine generates; on rank 0, while the others `follow()`. For the rest see `serve`."""
    engine.validate(" ")  # the first call settles the tokenizer's state, the following ones come from several threads
    metrics = Metrics(num_blocks=engine.kv_cache.num_blocks)
    async_engine = AsyncEngine(engine, max_queue=settings.max_queue, on_step=metrics.note_step)

    def explain() -> tuple[object, str]:
        explanation = shardformer.explain()
        return explanation.to_json(), str(explanation)

    service = Service(
        engine=async_engine,
        models=settings.models,
        template=ChatTemplate(cast(Any, engine.tokenizer), template=settings.chat_template),
        tokens=TokenTexts(engine.tokenizer),
        metrics=metrics,
        explain=explain,
        api_keys=settings.api_keys,
    )
    return await serve(build_app(service), async_engine, bound, grace_s=settings.grace_s, on_ready=on_ready)


async def serve(
    app: ASGIApp,
    engine: AsyncEngine,
    bound: socket.socket,
    *,
    grace_s: float,
    on_ready: Callable[[], None] = lambda: None,
) -> signal.Signals:
    """Serve until a signal comes, which is returned; must run in the main thread.

    What runs then may go on for `grace_s` seconds, less after another signal; no more is accepted. Raises the
    `RankFailure` that ends the engine, after a second in which clients are told.
    """
    signals = StopSignals()
    with signals.caught():
        await engine.start()
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            lifespan="off",
            ws="none",
            backlog=_BACKLOG,
            timeout_graceful_shutdown=_SEND_S,
        )
        server = _Server(config)
        serving = asyncio.ensure_future(server.serve(sockets=[bound]))
        while not server.started and not serving.done():
            await asyncio.sleep(0.005)
        on_ready()
        try:
            await _first(signals.asked.wait(), engine.wait_ended(), _done(serving))
            engine.refuse()
            await _first(engine.drain(grace_s), _urged(engine, signals))
            await engine.stop()
        except RankFailure:
            await asyncio.sleep(_LINGER_S)
            raise
        finally:
            server.should_exit = True
            await serving
    return signals.first or signal.SIGTERM


async def _urged(engine: AsyncEngine, signals: StopSignals) -> None:
    await signals.urged.wait()
    await engine.drain(0.0)


async def _first(*coroutines: object) -> None:
    """Wait for one of these; the others are cancelled."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]  # type: ignore[call-overload]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _done(task: asyncio.Future[None]) -> None:
    """Wait for the end of a task without cancelling it, whatever becomes of this."""
    await asyncio.wait({task})
