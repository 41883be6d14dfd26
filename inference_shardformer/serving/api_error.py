"""ApiError: what a client is told, in the form of the OpenAI API, with the field, the rule and the remedy."""

from __future__ import annotations

import json

from starlette.responses import Response

from inference_shardformer.errors import (
    InferenceShardformerError,
    QueueFullError,
    RequestError,
    StateError,
)

_RETRY_AFTER_S = 1
_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
}


class ApiError(Exception):
    """A refusal with its HTTP status. `param` is the field of the request that it is about."""

    def __init__(
        self, status: int, message: str, *, remedy: str, code: str = "invalid_value", param: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.remedy = remedy
        self.code = code
        self.param = param

    @classmethod
    def of(cls, error: InferenceShardformerError, *, param: str | None = None) -> ApiError:
        """The refusal that an error of the engine becomes."""
        status = 503
        if isinstance(error, RequestError):
            status = 400
        elif isinstance(error, QueueFullError):
            status = 429
        code = "stopping" if isinstance(error, StateError) else error.code
        return cls(status, error.message, remedy=error.remedy, code=code, param=param)

    def to_json(self) -> dict[str, object]:
        """The error object of the OpenAI API; `message` ends with the remedy, which `remedy` also holds alone."""
        message = f"{self.message}; {self.remedy}" if self.remedy else self.message
        kind = _TYPES.get(self.status, "server_error")
        return {
            "error": {
                "message": message,
                "type": kind,
                "param": self.param,
                "code": self.code,
                "remedy": self.remedy,
            }
        }

    def response(self) -> Response:
        """The answer to the client."""
        headers = {"Retry-After": str(_RETRY_AFTER_S)} if self.status in (429, 503) else {}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return json_response(self.to_json(), status=self.status, headers=headers)


_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


def json_bytes(content: object) -> bytes:
    """JSON in one line; what cannot be encoded, which only a client can have brought, becomes a question mark."""
    return _ENCODER.encode(content).encode(errors="replace")


def json_response(content: object, *, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A JSON answer."""
    return Response(json_bytes(content), status_code=status, headers=headers, media_type="application/json")
