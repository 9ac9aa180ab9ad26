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
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from itertools import count
from typing import Protocol, cast

import anyio
import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from lightning_bus import tokens
from lightning_bus.client import Client
from lightning_bus.clock import wall_ns
from lightning_bus.config import GatewaySection
from lightning_bus.errors import (
    BrokenError,
    BusyError,
    FencedError,
    LightningBusError,
    StopProcess,
    first_error,
)
from lightning_bus.gateway import recording, refusals
from lightning_bus.gateway.recording import Call, Json
from lightning_bus.gateway.refusals import (
    CLIENT_CLOSED_REQUEST,
    error,
    invalid,
    unanswered,
    unauthorized,
    unavailable,
)
from lightning_bus.gateway.streaming import WENT_AWAY, Relay, cancel_when_gone, span_id
from lightning_bus.gateway.upstream import Answer, Upstreams, learn_version
from lightning_bus.http import bind_tcp, http_server
from lightning_bus.spans import Span

CHAT = "/v1/chat/completions"
MODELS = "/v1/models"
BUS_PROBE_LIMIT_S = 2.0

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
            raise first_error(exc) from exc


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
        return Starlette(routes=routes, exception_handlers=refusals.HANDLERS, lifespan=self._lifespan)

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
            retry_count=_number(request.headers.get("x-stainless-retry-count")),
        )
        if sent["stream"]:
            return await self._stream(key, call, asked)
        response: Response | None = None

        async def ask() -> None:
            nonlocal response
            response = await self._whole(key, call, asked)
            tasks.cancel_scope.cancel()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(cancel_when_gone, request.receive, tasks.cancel_scope)
            tasks.start_soon(ask)
        if response is None:  # the agent hung up; the engine was told by the closed connection
            await self.record([recording.failed_span(call, WENT_AWAY, wall_ns(), span_id())], call)
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        return response

    async def models(self, request: Request) -> Response:
        """Pass the engine's list of models on."""
        claims = self._claims(request)
        try:
            answer = await self.upstreams.call(claims.rollout_id, "GET", MODELS)
        except (BusyError, BrokenError) as exc:
            return unanswered(exc)
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
            refusal = await self.record([recording.failed_span(call, str(exc), wall_ns(), span_id())], call)
            return refusal or unanswered(exc)
        end_ns = wall_ns()
        if answer.status != 200:
            return await self._engine_refused(answer, call)
        try:
            response = _decode(answer.body)
        except msgspec.DecodeError as exc:
            response = exc
        if not isinstance(response, dict):
            why = f"engine {answer.engine.url} answered 200 with what is not a JSON object: {answer.body[:200]!r}"
            refusal = await self.record([recording.failed_span(call, why, end_ns, span_id())], call)
            return refusal or error(502, why, "server_error")
        body = cast(Json, response)
        spans = recording.model_call_spans(call, body, end_ns, span_id)
        learn_version(answer, spans)
        refusal = await self.record(spans, call)
        return refusal or Response(_encode(recording.as_asked(body, asked)), media_type="application/json")

    async def _stream(self, key: str, call: Call, asked: Json) -> Response:
        """Ask for a stream; once the engine has begun to answer, the rest is `Relay`'s."""
        try:
            answer = await self.upstreams.call(key, "POST", CHAT, call.request_json, stream=True)
        except (BusyError, BrokenError) as exc:
            refusal = await self.record([recording.failed_span(call, str(exc), wall_ns(), span_id())], call)
            return refusal or unanswered(exc)
        if answer.status != 200:
            return await self._engine_refused(answer, call)
        return Relay(self.record, answer, call, asked)

    async def _engine_refused(self, answer: Answer, call: Call) -> Response:
        why = f"engine answered {answer.status}: {answer.body[:500].decode(errors='replace')}"
        refusal = await self.record([recording.failed_span(call, why, wall_ns(), span_id())], call)
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
            return error(
                409, message, "invalid_request_error", code="attempt_over", headers={"x-should-retry": "false"}
            )
        except (BusyError, BrokenError) as exc:
            return unavailable(exc)
        except StopProcess as exc:
            self.broken = exc
            self._on_broken()
            return error(500, str(exc), "server_error", headers={"x-should-retry": "false"})
        except LightningBusError as exc:
            return error(500, str(exc), "server_error", headers={"x-should-retry": "false"})
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
            raise unauthorized(f"{exc}. Use the api_key that the worker gave to this attempt.") from exc
        if rollout_id and (claims.rollout_id, claims.attempt) != (rollout_id, attempt):
            raise unauthorized(
                f"The API key is for rollout {claims.rollout_id} attempt {claims.attempt}, the address for rollout "
                f"{rollout_id} attempt {attempt}. Use base_url and api_key of the same attempt."
            )
        return claims

    async def _body(self, request: Request) -> Json:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise invalid(415, f"The content type is {kind or 'missing'}. Send application/json.")
        size = _number(request.headers.get("content-length"))
        parts: list[bytes] = []
        if size <= self._body_bytes_max:
            size = 0
            async for part in request.stream():
                parts.append(part)
                size += len(part)
                if size > self._body_bytes_max:
                    break
        if size > self._body_bytes_max:
            raise invalid(
                413, f"The request exceeds {self._body_bytes_max} bytes. Send less, or raise [gateway] body_bytes_max."
            )
        try:
            body = _decode(b"".join(parts))
        except (msgspec.DecodeError, UnicodeDecodeError) as exc:
            raise invalid(400, f"The request is not JSON: {exc}.") from exc
        if not isinstance(body, dict):
            raise invalid(400, f"The request is a JSON {type(body).__name__}. Send an object.")
        return cast(Json, body)

    def _warn_of_skew(self, request: Json) -> None:
        for name in recording.skewing_parameters(request):
            if name not in self._warned:
                self._warned.add(name)
                _log.warning(
                    "an agent samples with %s=%r: log-probs are of the full softmax, so the calls are slightly off-policy. "
                    "Leave it neutral, or have the submission's overrides set it, to train exactly. Said once.", name, request[name]
                )  # fmt: skip


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


def _number(text: str | None) -> int:
    return int(text) if text is not None and text.isdecimal() else 0


def _is_loopback(address: str) -> bool:
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
