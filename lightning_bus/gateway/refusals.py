"""How the gateway says no: OpenAI's error shape, so that the agent's own SDK understands it, its retries included."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from lightning_bus.errors import BrokenError, BusyError
from lightning_bus.gateway.recording import Json

CLIENT_CLOSED_REQUEST = 499  # nginx's word for an answer that nobody reads

_encode = msgspec.json.Encoder().encode


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


def unauthorized(message: str) -> Refused:
    return Refused(error(401, message, "invalid_request_error", code="invalid_api_key"))


def invalid(status: int, message: str) -> Refused:
    return Refused(error(status, message, "invalid_request_error"))


def unavailable(exc: BusyError | BrokenError) -> Response:
    retry_after_s = exc.retry_after_s if isinstance(exc, BusyError) else 1.0
    return error(
        503, str(exc), "server_error", code="unavailable", headers={"retry-after": str(max(1, round(retry_after_s)))}
    )


def unanswered(exc: BusyError | BrokenError) -> Response:
    """No engine took the call: 503. One took it and was too slow: 504."""
    return unavailable(exc) if isinstance(exc, BusyError) else error(504, str(exc), "server_error", code="timeout")


async def _on_refused(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, Refused)
    return exc.response


async def _on_http_exception(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, HTTPException)
    message = f"{exc.detail}: {request.method} {request.url.path}. Here are POST /v1/chat/completions, GET /v1/models and GET /health."
    return error(exc.status_code, message, "invalid_request_error", headers=exc.headers)


async def _on_bug(request: Request, exc: Exception) -> Response:
    return error(500, f"{type(exc).__name__} in the gateway; its log has the traceback.", "server_error")


async def _on_gone(request: Request, exc: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)


HANDLERS = {Refused: _on_refused, HTTPException: _on_http_exception, ClientDisconnect: _on_gone, Exception: _on_bug}
