"""The OpenAI-compatible door that agents call. It asks an engine, records the call, and answers.

    agent ──► token ──► engine ──► span ──► durable? ──► answer

What always holds: the span of a call is on disk before the agent sees the end of the answer, so nothing an agent has
acted on can be missing from the log. A call of an attempt that is over is answered 409 and is not in the log. Every
refusal has OpenAI's error shape, so the agent's SDK understands it, its retries included.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from itertools import count
from typing import Protocol, cast

import anyio
import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from lightning_bus import tokens
from lightning_bus.client import Client
from lightning_bus.clock import wall_ns
from lightning_bus.config import GatewaySection
from lightning_bus.daemon import first_cause
from lightning_bus.errors import (
    BrokenError,
    BusyError,
    FencedError,
    LightningBusError,
    StopProcess,
)
from lightning_bus.gateway import recording
from lightning_bus.gateway.recording import Call, Json, StreamRecord
from lightning_bus.gateway.upstream import Answer, Upstreams
from lightning_bus.http import bind_tcp, http_server
from lightning_bus.spans import WEIGHT_VERSIONS, Span

CHAT = "/v1/chat/completions"
MODELS = "/v1/models"
BUS_PROBE_LIMIT_S = 2.0
CLIENT_CLOSED_REQUEST = 499  # nginx's word for an answer that nobody reads

_log = logging.getLogger("lightning_bus.gateway")
_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder().decode


class Bus(Protocol):
    """What the gateway needs of a client of the bus."""

    async def append(self, rollout_id: str, attempt: int, spans: Sequence[Span]) -> None: ...

    async def status(self) -> object: ...


async def serve_gateway(
    section: GatewaySection, *, bus_address: str, secret: bytes, started: Callable[[str], None] | None = None
) -> None:
    """Serve until cancelled; calls in flight then have a few seconds to end.

    `started` is called with the gateway's URL once it accepts connections. Raises CallError when the address cannot
    be bound, and StopProcess when the bus can no longer be used.
    """
    with bind_tcp(section.bind, "gateway.bind") as listener:
        stop = anyio.Event()
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(_set_when_cancelled, stop)
                await _serve_until(stop, section, bus_address, secret, listener, started)
                tasks.cancel_scope.cancel()
        except ExceptionGroup as exc:
            raise first_cause(exc) from exc


async def _serve_until(
    stop: anyio.Event,
    section: GatewaySection,
    bus_address: str,
    secret: bytes,
    listener: socket.socket,
    started: Callable[[str], None] | None,
) -> None:
    """Serve until `stop`. Shielded from cancellation, because calls in flight need the bus a little longer than that."""
    connected = False

    with anyio.CancelScope(shield=True) as scope:
        async with anyio.create_task_group() as tasks:

            async def give_up() -> None:
                await stop.wait()
                if not connected:
                    scope.cancel()  # nobody waits for a bus that is not there yet

            tasks.start_soon(give_up)
            async with Client(bus_address, role="gateway", limit_s=section.admission_wait_s) as bus:
                connected = True
                gateway = Gateway(bus, section, secret, on_broken=stop.set)
                async with http_server(gateway.app(), listener, started):
                    await stop.wait()
                await gateway.upstreams.aclose()
                if gateway.broken is not None:
                    raise gateway.broken
            tasks.cancel_scope.cancel()


async def _set_when_cancelled(event: anyio.Event) -> None:
    try:
        await anyio.sleep_forever()
    finally:
        event.set()


def build_app(bus: Bus, *, section: GatewaySection, secret: bytes) -> Starlette:
    """Return the gateway as an ASGI application that appends to `bus`."""
    return Gateway(bus, section, secret).app()


class Gateway:
    """The handlers and what they share."""

    def __init__(
        self, bus: Bus, section: GatewaySection, secret: bytes, *, on_broken: Callable[[], None] = lambda: None
    ) -> None:
        self.upstreams = Upstreams(
            section.upstreams, admission_wait_s=section.admission_wait_s, request_limit_s=section.request_limit_s
        )
        self.broken: StopProcess | None = None  # why the bus can no longer be used
        self._on_broken = on_broken
        self._bus = bus
        self._body_bytes_max = section.body_bytes_max
        self._secret = secret
        self._open = _is_loopback(section.bind)
        self._sequence = count(1)
        self._warned: set[str] = set()

    def app(self) -> Starlette:
        attempt = "/rollout/{rollout_id}/attempt/{attempt:int}"
        routes = [
            Route(attempt + CHAT, self.chat, methods=["POST"]),
            Route(CHAT, self.chat, methods=["POST"]),
            Route(attempt + MODELS, self.models, methods=["GET"]),
            Route(MODELS, self.models, methods=["GET"]),
            Route("/health", self.health, methods=["GET"]),
        ]
        return Starlette(routes=routes, exception_handlers=_HANDLERS, lifespan=self._lifespan)

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncGenerator[None]:
        try:
            yield
        finally:
            await self.upstreams.aclose()

    async def chat(self, request: Request) -> Response:
        """Answer a chat completion and record it."""
        claims = self._claims(request)
        asked = await self._body(request)
        key = claims.rollout_id or str(next(self._sequence))
        sent = recording.prepare(asked, claims, cache_salt=self.upstreams.engine_of(key).version)
        self._warn_of_skew(sent)
        trace_id, parent_id = _parent(request, claims)
        call = Call(
            rollout_id=claims.rollout_id,
            attempt=claims.attempt,
            trace_id=trace_id,
            parent_id=parent_id,
            request=sent,
            request_json=_encode(sent),
            start_ns=wall_ns(),
            retry_count=_whole(request.headers.get("x-stainless-retry-count")),
        )
        if sent["stream"]:
            return await self._stream(key, call, asked)
        response: Response | None = None

        async def ask() -> None:
            nonlocal response
            response = await self._whole(key, call, asked)
            tasks.cancel_scope.cancel()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_cancel_when_gone, request.receive, tasks.cancel_scope)
            tasks.start_soon(ask)
        if response is None:  # the agent hung up; the engine was told by the closed connection
            await self.record([recording.failed_span(call, _WENT_AWAY, wall_ns(), _span_id())], call)
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        return response

    async def models(self, request: Request) -> Response:
        """Pass the engine's list of models on."""
        claims = self._claims(request)
        try:
            answer = await self.upstreams.call(claims.rollout_id, "GET", MODELS)
        except (BusyError, BrokenError) as exc:
            return _unanswered(exc)
        return Response(answer.body, answer.status, media_type=answer.content_type)

    async def health(self, request: Request) -> Response:
        """200 when the bus and at least one engine can be reached; the body says what cannot."""
        try:
            with anyio.fail_after(BUS_PROBE_LIMIT_S):
                await self._bus.status()
            bus = "ok"
        except TimeoutError:
            bus = f"silent for {BUS_PROBE_LIMIT_S:g} s"
        except LightningBusError as exc:
            bus = str(exc)
        upstreams = await self.upstreams.probe()
        healthy = bus == "ok" and "ok" in upstreams.values()
        body = _encode({"status": "ok" if healthy else "unavailable", "bus": bus, "upstreams": upstreams})
        return Response(body, 200 if healthy else 503, media_type="application/json")

    # -- one call

    async def _whole(self, key: str, call: Call, asked: Json) -> Response:
        """Ask for the answer in one piece, record it, return it."""
        try:
            answer = await self.upstreams.call(key, "POST", CHAT, call.request_json)
        except (BusyError, BrokenError) as exc:
            refusal = await self.record([recording.failed_span(call, str(exc), wall_ns(), _span_id())], call)
            return refusal or _unanswered(exc)
        end_ns = wall_ns()
        if answer.status != 200:
            return await self._engine_refused(answer, call)
        try:
            response = _decode(answer.body)
        except msgspec.DecodeError as exc:
            response = exc
        if not isinstance(response, dict):
            error = f"engine {answer.engine.url} answered 200 with what is not a JSON object: {answer.body[:200]!r}"
            refusal = await self.record([recording.failed_span(call, error, end_ns, _span_id())], call)
            return refusal or _error(502, error, "server_error")
        body = cast(Json, response)
        spans = recording.model_call_spans(call, body, end_ns, _span_id)
        _learn_version(answer, spans)
        refusal = await self.record(spans, call)
        return refusal or Response(_encode(recording.as_asked(body, asked)), media_type="application/json")

    async def _stream(self, key: str, call: Call, asked: Json) -> Response:
        """Ask for a stream; once the engine has begun to answer, the rest is `_Relay`'s."""
        try:
            answer = await self.upstreams.call(key, "POST", CHAT, call.request_json, stream=True)
        except (BusyError, BrokenError) as exc:
            refusal = await self.record([recording.failed_span(call, str(exc), wall_ns(), _span_id())], call)
            return refusal or _unanswered(exc)
        if answer.status != 200:
            return await self._engine_refused(answer, call)
        return _Relay(self, answer, call, asked)

    async def _engine_refused(self, answer: Answer, call: Call) -> Response:
        error = f"engine answered {answer.status}: {answer.body[:500].decode(errors='replace')}"
        refusal = await self.record([recording.failed_span(call, error, wall_ns(), _span_id())], call)
        return refusal or Response(answer.body, answer.status, media_type=answer.content_type)

    async def record(self, spans: list[Span], call: Call) -> Response | None:
        """Make the spans durable. Returns None, or the refusal that the agent gets instead of its answer."""
        numbered = [msgspec.structs.replace(span, sequence=next(self._sequence)) for span in spans]
        try:
            # Once begun an append goes on even if the agent hangs up: the call did happen.
            with anyio.CancelScope(shield=True):
                await self._bus.append(call.rollout_id, call.attempt, numbered)
        except FencedError as exc:
            message = f"The attempt is over: {exc} Nothing that this agent still does counts; stop it."
            return _error(
                409, message, "invalid_request_error", code="attempt_over", headers={"x-should-retry": "false"}
            )
        except (BusyError, BrokenError) as exc:
            return _unavailable(exc)
        except StopProcess as exc:
            self.broken = exc
            self._on_broken()
            return _error(500, str(exc), "server_error", headers={"x-should-retry": "false"})
        except LightningBusError as exc:
            return _error(500, str(exc), "server_error", headers={"x-should-retry": "false"})
        return None

    # -- what a request says

    def _claims(self, request: Request) -> tokens.Claims:
        """Return whose call this is. Refuses a key that was not made for the rollout and attempt in the address."""
        rollout_id: str = request.path_params.get("rollout_id", "")
        attempt: int = request.path_params.get("attempt", 0)
        kind, _, token = request.headers.get("authorization", "").partition(" ")
        try:
            if kind.lower() != "bearer":
                raise tokens.BadToken("no API key was sent")
            claims = tokens.check(self._secret, token.strip())
        except tokens.BadToken as exc:
            if not rollout_id and self._open:
                return tokens.Claims("", 0)
            raise _unauthorized(f"{exc}. Use the api_key that the worker gave to this attempt.") from exc
        if rollout_id and (claims.rollout_id, claims.attempt) != (rollout_id, attempt):
            raise _unauthorized(
                f"The API key is for rollout {claims.rollout_id} attempt {claims.attempt}, the address for rollout "
                f"{rollout_id} attempt {attempt}. Use base_url and api_key of the same attempt."
            )
        return claims

    async def _body(self, request: Request) -> Json:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise _invalid(415, f"The content type is {kind or 'missing'}. Send application/json.")
        size = _whole(request.headers.get("content-length"))
        parts: list[bytes] = []
        if size <= self._body_bytes_max:
            size = 0
            async for part in request.stream():
                parts.append(part)
                size += len(part)
                if size > self._body_bytes_max:
                    break
        if size > self._body_bytes_max:
            raise _invalid(
                413, f"The request exceeds {self._body_bytes_max} bytes. Send less, or raise [gateway] body_bytes_max."
            )
        try:
            body = _decode(b"".join(parts))
        except (msgspec.DecodeError, UnicodeDecodeError) as exc:
            raise _invalid(400, f"The request is not JSON: {exc}.") from exc
        if not isinstance(body, dict):
            raise _invalid(400, f"The request is a JSON {type(body).__name__}. Send an object.")
        return cast(Json, body)

    def _warn_of_skew(self, request: Json) -> None:
        for name in recording.skewing_parameters(request):
            if name not in self._warned:
                self._warned.add(name)
                _log.warning(
                    "an agent samples with %s=%r: log-probs are of the full softmax, so the calls are slightly off-policy. "
                    "Leave it neutral, or have the submission's overrides set it, to train exactly. Said once.", name, request[name]
                )  # fmt: skip


class _Relay(Response):
    """A stream on its way through: chunk by chunk, except that the end waits until the span is durable."""

    def __init__(self, gateway: Gateway, answer: Answer, call: Call, asked: Json) -> None:
        super().__init__()
        self._gateway = gateway
        self._answer = answer
        self._call = call
        self._asked = asked
        self._record = StreamRecord()
        self._first_token_ns = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        end: tuple[list[bytes], str] | None = None

        async def relay() -> None:
            nonlocal end
            await send({"type": "http.response.start", "status": 200, "headers": _SSE_HEADERS})
            end = await self._pass_on(send)
            tasks.cancel_scope.cancel()

        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(_cancel_when_gone, receive, tasks.cancel_scope)
                tasks.start_soon(relay)
        finally:
            await self._answer.close()  # if the agent hung up, this is what tells the engine to stop
        held, broke = end or ([], _WENT_AWAY)
        spans = recording.model_call_spans(
            self._call,
            self._record.response(),
            wall_ns(),
            _span_id,
            first_token_ns=self._first_token_ns,
            interrupted=broke,
        )
        _learn_version(self._answer, spans)
        refusal = await self._gateway.record(spans, self._call)
        if end is None:
            return
        if refusal is not None:
            held = [b"data: " + bytes(refusal.body) + b"\n\n"]
        elif not broke:
            held.append(b"data: [DONE]\n\n")
        await send({"type": "http.response.body", "body": b"".join(held)})

    async def _pass_on(self, send: Send) -> tuple[list[bytes], str]:
        """Relay what may leave at once. Returns the events held back, and why the stream is not whole if it is not."""
        held: list[bytes] = []
        options = cast(Json, self._asked.get("stream_options") or {})
        wants_usage = bool(options.get("include_usage"))
        try:
            async for chunk in _events(self._answer):
                if "error" in chunk:
                    return [*held, _event(chunk)], f"the engine broke off: {chunk['error']}"
                self._record.add(chunk)
                if self._record.choices and not self._first_token_ns:
                    self._first_token_ns = wall_ns()
                choices: list[Json] = chunk.get("choices") or []
                if not choices and not wants_usage:
                    continue
                data = _event(recording.as_asked(chunk, self._asked))
                if not choices or any(choice.get("finish_reason") for choice in choices):
                    held.append(data)
                else:
                    await send({"type": "http.response.body", "body": data, "more_body": True})
        except BrokenError as exc:
            return [*held, _event(_error_body(str(exc), "server_error", None))], "the engine broke off"
        if not self._record.finished:
            message = f"engine {self._answer.engine.url} ended its stream before the answer was finished"
            return [*held, _event(_error_body(message, "server_error", None))], "the engine broke off"
        return held, ""


_WENT_AWAY = "client went away"
_SSE_HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]


async def _events(answer: Answer) -> AsyncIterator[Json]:
    """The JSON objects of a server-sent stream, up to [DONE]. Raises BrokenError when one cannot be read."""
    rest = b""
    while (part := await answer.chunk()) is not None:
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            name, _, data = line.strip().partition(b":")
            if name != b"data":
                continue
            if data.strip() == b"[DONE]":
                return
            try:
                chunk = _decode(data)
            except msgspec.DecodeError as exc:
                raise BrokenError(f"engine {answer.engine.url} streamed what is not JSON: {data[:200]!r}") from exc
            if isinstance(chunk, dict):
                yield cast(Json, chunk)


def _event(body: Json) -> bytes:
    return b"data: " + _encode(body) + b"\n\n"


async def _cancel_when_gone(receive: Receive, scope: anyio.CancelScope) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    scope.cancel()


def _learn_version(answer: Answer, spans: Sequence[Span]) -> None:
    """Remember which weights the engine answers with, for the salt of the next call's prefix cache.

    Keys and values computed under old weights would give the new version's name to log-probs that are not its own.
    Versions of the policy are numbers; a scripted model's is not, and says nothing of the policy's.
    """
    versions = spans[-1].attributes.get(WEIGHT_VERSIONS)
    if versions and versions[-1][0].isdecimal():
        answer.engine.version = versions[-1][0]


def _parent(request: Request, claims: tokens.Claims) -> tuple[bytes, bytes | None]:
    """Trace and parent of a call: what the request's traceparent says, else the attempt's root span."""
    parts = request.headers.get("traceparent", "").split("-")
    if len(parts) >= 4 and len(parts[1]) == 32 and len(parts[2]) == 16:
        try:
            trace_id, parent_id = bytes.fromhex(parts[1]), bytes.fromhex(parts[2])
        except ValueError:
            pass
        else:
            if any(trace_id) and any(parent_id):
                return trace_id, parent_id
    if claims.rollout_id:
        return recording.root_of_attempt(claims.rollout_id, claims.attempt)
    return os.urandom(16), None


def _span_id() -> bytes:
    return os.urandom(8)


def _whole(text: str | None) -> int:
    return int(text) if text and text.isdecimal() else 0


# -- refusals


class _Refused(Exception):
    """A request that is answered before any engine is asked."""

    def __init__(self, response: Response) -> None:
        super().__init__(response.status_code)
        self.response = response


def _error_body(message: str, kind: str, code: str | None) -> Json:
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def _error(
    status: int, message: str, kind: str, *, code: str | None = None, headers: Mapping[str, str] | None = None
) -> Response:
    return Response(_encode(_error_body(message, kind, code)), status, headers, "application/json")


def _unauthorized(message: str) -> _Refused:
    return _Refused(_error(401, message, "invalid_request_error", code="invalid_api_key"))


def _invalid(status: int, message: str) -> _Refused:
    return _Refused(_error(status, message, "invalid_request_error"))


def _unavailable(exc: BusyError | BrokenError) -> Response:
    retry_after_s = exc.retry_after_s if isinstance(exc, BusyError) else 1.0
    return _error(
        503, str(exc), "server_error", code="unavailable", headers={"retry-after": str(max(1, round(retry_after_s)))}
    )


def _unanswered(exc: BusyError | BrokenError) -> Response:
    """No engine took the call: 503. One took it and was too slow: 504."""
    return _unavailable(exc) if isinstance(exc, BusyError) else _error(504, str(exc), "server_error", code="timeout")


async def _on_refused(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, _Refused)
    return exc.response


async def _on_http_exception(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, HTTPException)
    message = f"{exc.detail}: {request.method} {request.url.path}. Here are POST {CHAT}, GET {MODELS} and GET /health."
    return _error(exc.status_code, message, "invalid_request_error", headers=exc.headers)


async def _on_bug(request: Request, exc: Exception) -> Response:
    return _error(500, f"{type(exc).__name__} in the gateway; its log has the traceback.", "server_error")


async def _on_gone(request: Request, exc: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)


_HANDLERS = {_Refused: _on_refused, HTTPException: _on_http_exception, ClientDisconnect: _on_gone, Exception: _on_bug}


def _is_loopback(address: str) -> bool:
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
