"""The ASGI application: its routes, who may use them, and how errors are told."""

from __future__ import annotations

import hmac
from time import perf_counter

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from inference_shardformer.errors import InferenceShardformerError
from inference_shardformer.serving import wanted
from inference_shardformer.serving.answer import Answer, EventStream, whole_answer
from inference_shardformer.serving.api_error import ApiError, json_response
from inference_shardformer.serving.body import read_object
from inference_shardformer.serving.formats import ChatFormat, CompletionFormat, Format
from inference_shardformer.serving.generation import Generation
from inference_shardformer.serving.metrics import CONTENT_TYPE
from inference_shardformer.serving.service import Service

_OPEN = ("/health", "/metrics")  # without a key: for probes and collectors


def build_app(service: Service) -> Starlette:
    """The application over a service."""
    routes = [
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/chat/completions", chat_completions, methods=["POST"]),
        Route("/v1/models", models, methods=["GET"]),
        Route("/v1/models/{name:path}", one_model, methods=["GET"]),
        Route("/health", health, methods=["GET"]),
        Route("/metrics", metrics, methods=["GET"]),
        Route("/explain", explain, methods=["GET"]),
    ]
    app = Starlette(
        routes=routes,
        middleware=[Middleware(_Gate, service=service, known=frozenset(str(route.path) for route in routes))],
        exception_handlers={
            ApiError: lambda _, error: error.response(),
            InferenceShardformerError: lambda _, error: ApiError.of(error).response(),
            HTTPException: _http_error,
            Exception: _unexpected,
        },
    )
    app.state.service = service
    return app


async def completions(request: Request) -> Response:
    """POST /v1/completions."""
    started, service = perf_counter(), _service(request)
    asked = wanted.completion(await read_object(request), models=service.models)
    generation = await service.generation(asked.prompts, asked.params, param="prompt", started=started)
    return await _answered(
        request,
        asked,
        generation,
        CompletionFormat(asked.model, tokens=service.tokens, includes_usage=asked.includes_usage),
    )


async def chat_completions(request: Request) -> Response:
    """POST /v1/chat/completions."""
    started, service = perf_counter(), _service(request)
    asked = wanted.chat(await read_object(request), models=service.models)
    prompt = await service.chat_token_ids(asked.messages)
    generation = await service.generation([prompt], asked.params, param="messages", started=started)
    form = ChatFormat(asked.model, tokens=service.tokens, includes_usage=asked.includes_usage)
    return await _answered(request, asked, generation, form)


async def models(request: Request) -> Response:
    """GET /v1/models."""
    service = _service(request)
    return json_response({"object": "list", "data": [_model(service, name) for name in service.models]})


async def one_model(request: Request) -> Response:
    """GET /v1/models/NAME."""
    service, name = _service(request), request.path_params["name"]
    if name not in service.models:
        remedy = f"choose one of {', '.join(service.models)}"
        raise ApiError(404, f"model={name!a} is not served here", remedy=remedy, code="model_not_found", param="model")
    return json_response(_model(service, name))


async def health(request: Request) -> Response:
    """GET /health: 200 while requests are taken, else 503 and why they are not."""
    engine = _service(request).engine
    if engine.failure is not None:
        return json_response({"status": "failed", **ApiError.of(engine.failure).to_json()}, status=503)
    if not engine.is_accepting:
        return json_response({"status": "stopping"}, status=503)
    return json_response({"status": "ready"})


async def metrics(request: Request) -> Response:
    """GET /metrics."""
    return Response(_service(request).metrics.text(), headers={"Content-Type": CONTENT_TYPE})


async def explain(request: Request) -> Response:
    """GET /explain: what was decided and why; as text with ?format=text."""
    content, text = _service(request).explain()
    return PlainTextResponse(text) if request.query_params.get("format") == "text" else json_response(content)


async def _answered(request: Request, asked: wanted.Wanted, generation: Generation, form: Format) -> Response:
    answer = Answer(generation, form)
    return EventStream(answer) if asked.is_streaming else await whole_answer(request, answer)


class _Gate:
    """Lets those in who have a key, and counts answers."""

    def __init__(self, app: ASGIApp, *, service: Service, known: frozenset[str]) -> None:
        self._app = app
        self._service = service
        self._known = known

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        route = scope["path"] if scope["path"] in self._known else "other"

        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._service.metrics.note_response(route, message["status"])
            await send(message)

        if scope["path"] not in _OPEN and not self._is_let_in(dict(scope["headers"]).get(b"authorization", b"")):
            error = ApiError(
                401,
                "the API key is missing or wrong",
                remedy="send `Authorization: Bearer KEY` with a key that the server was started with",
                code="invalid_api_key",
            )
            await error.response()(scope, receive, counting)
            return
        await self._app(scope, receive, counting)

    def _is_let_in(self, authorization: bytes) -> bool:
        kind, _, key = authorization.partition(b" ")
        given = key.strip() if kind.lower() == b"bearer" else b""
        keys = self._service.api_keys
        return not keys or any([hmac.compare_digest(given, known.encode()) for known in keys])  # noqa: C419 - all are compared


def _service(request: Request) -> Service:
    return request.app.state.service


def _model(service: Service, name: str) -> dict[str, object]:
    return {"id": name, "object": "model", "created": service.started, "owned_by": "inference-shardformer"}


async def _http_error(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    what = {404: "is not a route of this server", 405: "does not take this method"}.get(status, str(error))
    refusal = ApiError(
        status,
        f"{request.method} {request.url.path} {what}",
        remedy="routes: POST /v1/completions, POST /v1/chat/completions, GET /v1/models, /health, /metrics, /explain",
        code="unknown_route",
    )
    return refusal.response()


async def _unexpected(request: Request, error: Exception) -> Response:
    message = f"unexpected {type(error).__name__}"
    return ApiError(500, message, remedy="report it with the traceback in the server's log", code="internal").response()
