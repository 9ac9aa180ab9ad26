"""How the gateway says no, so that the agent's own SDK understands it, its retries included.

Every refusal is made in OpenAI's error shape; on the way out of an address of Anthropic's it is put into theirs.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from lightning_bus.errors import BrokenError, BusyError
from lightning_bus.gateway import anthropic_messages
from lightning_bus.gateway.dialects import Json, dictionary

CLIENT_CLOSED_REQUEST = 499  # nginx's word for an answer that nobody reads

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder().decode


class Refused(Exception):
    """A request that is answered before any engine is asked."""

    def __init__(self, response: Response) -> None:
        super().__init__(response.status_code)
        self.response = response


def error_body(message: str, kind: str, code: str | None) -> Json:
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def error(
    status: int, message: str, kind: str, *, code: str | None = None, headers: Mapping[str, str] | None = None
) -> Response:
    return Response(_encode(error_body(message, kind, code)), status, headers, "application/json")


def unauthorized(message: str, code: str = "invalid_api_key") -> Refused:
    return Refused(error(401, message, "invalid_request_error", code=code))


def invalid(status: int, message: str) -> Refused:
    return Refused(error(status, message, "invalid_request_error"))


def too_many(message: str) -> Refused:
    return Refused(error(429, message, "rate_limit_error", code="rate_limit_exceeded", headers={"retry-after": "1"}))


def unavailable(exc: BusyError | BrokenError) -> Response:
    retry_after_s = exc.retry_after_s if isinstance(exc, BusyError) else 1.0
    return error(
        503, str(exc), "server_error", code="unavailable", headers={"retry-after": str(max(1, round(retry_after_s)))}
    )


def unanswered(exc: BusyError | BrokenError) -> Response:
    """No engine took the call: 503. One took it and was too slow: 504."""
    return unavailable(exc) if isinstance(exc, BusyError) else error(504, str(exc), "server_error", code="timeout")


def by_engine(status: int, body: bytes) -> Response:
    """An engine's own refusal: as it is where it has OpenAI's shape, else put into it."""
    try:
        said = dictionary(_decode(body))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        said = {}
    if isinstance(said.get("error"), dict):
        return Response(body, status, media_type="application/json")
    message = said.get("message") or said.get("detail") or body[:500].decode(errors="replace") or "no reason given"
    kind = "invalid_request_error" if status < 500 else "server_error"
    return error(status, f"The engine answered {status}: {message}", kind)


def in_shape_of(path: str, response: Response) -> Response:
    """Return a response as the SDK that calls this address expects it."""
    if response.status_code < 400 or anthropic_messages.MESSAGES not in path or not response.body:
        return response
    fields = dictionary(dictionary(_decode(bytes(response.body))).get("error"))
    body = anthropic_messages.error_body(response.status_code, str(fields.get("message")))
    kept = {name: value for name, value in response.headers.items() if name in ("retry-after", "x-should-retry")}
    return Response(_encode(body), response.status_code, kept, "application/json")


async def _on_refused(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, Refused)
    return in_shape_of(request.url.path, exc.response)


async def _on_http_exception(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, HTTPException)
    message = (
        f"{exc.detail}: {request.method} {request.url.path}. Here are POST /v1/chat/completions, /v1/completions, "
        "/v1/responses, /v1/messages and /v1/traces, GET /v1/models, /health and /metrics."
    )
    return in_shape_of(request.url.path, error(exc.status_code, message, "invalid_request_error", headers=exc.headers))


async def _on_bug(request: Request, exc: Exception) -> Response:
    message = f"{type(exc).__name__} in the gateway; its log has the traceback."
    return in_shape_of(request.url.path, error(500, message, "server_error"))


async def _on_gone(request: Request, exc: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)


HANDLERS = {Refused: _on_refused, HTTPException: _on_http_exception, ClientDisconnect: _on_gone, Exception: _on_bug}
