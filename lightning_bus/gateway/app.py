"""The door that agents call, in OpenAI's words or Anthropic's. It asks an engine, records the call, and answers.

    agent ──► token ──► engine ──► span ──► durable? ──► answer

What always holds: the span of a call is on disk before the agent sees the end of the answer, so nothing an agent has
acted on can be missing from the log. A call of an attempt that is over is answered 409 and is not in the log; the next
one is answered 401, and no engine is asked for it. Every refusal has the shape that the agent's own SDK understands,
its retries included.
"""

from __future__ import annotations

import ipaddress
import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from itertools import count
from typing import Protocol

import anyio
import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from lightning_bus.clock import monotonic_s, wall_ns
from lightning_bus.config import GatewaySection
from lightning_bus.errors import (
    BrokenError,
    BusyError,
    FencedError,
    LightningBusError,
    StopProcess,
)
from lightning_bus.gateway import recording, refusals
from lightning_bus.gateway.anthropic_messages import MESSAGES, Messages, models_page
from lightning_bus.gateway.attempts import Attempts
from lightning_bus.gateway.calls import Calls
from lightning_bus.gateway.dialects import CHAT, BadRequest, Chat, Completions, Dialect, Json, array
from lightning_bus.gateway.engines import MODELS, object_of
from lightning_bus.gateway.metrics import Meters
from lightning_bus.gateway.openai_responses import Responses
from lightning_bus.gateway.recording import Call
from lightning_bus.gateway.refusals import (
    CLIENT_CLOSED_REQUEST,
    Refused,
    by_engine,
    error,
    in_shape_of,
    invalid,
    unanswered,
    unavailable,
)
from lightning_bus.gateway.requests import agent_name_of, body_of, claims_of, number, parent_of, user_agent_of
from lightning_bus.gateway.streaming import WENT_AWAY, Relay, cancel_when_gone
from lightning_bus.gateway.token_route import TokenRoute
from lightning_bus.gateway.upstream import Upstreams
from lightning_bus.otel.ingest import Ingest
from lightning_bus.spans import Span
from lightning_bus.tokens import Claims

TOKENIZE = "/tokenize"
DIALECTS: tuple[Dialect, ...] = (Chat(), Completions(), Messages(), Responses())
BUS_PROBE_LIMIT_S = 2.0

_log = logging.getLogger("lightning_bus.gateway")
_encode = msgspec.json.Encoder().encode


class Bus(Protocol):
    """What the gateway needs of a client of the bus."""

    async def append(self, rollout_id: str, attempt: int, spans: Sequence[Span]) -> None: ...

    async def status(self) -> object: ...


def build_app(bus: Bus, *, section: GatewaySection, secret: bytes) -> Starlette:
    """Return the gateway as an ASGI application that appends to `bus`."""
    return Gateway(bus, section, secret).app()


class Gateway:
    """The handlers and what they share."""

    def __init__(
        self, bus: Bus, section: GatewaySection, secret: bytes, *, on_broken: Callable[[], None] = lambda: None,
        traces: Bus | None = None,
    ) -> None:  # fmt: skip
        self.upstreams = Upstreams(
            section.upstreams, admission_wait_s=section.admission_wait_s, request_limit_s=section.request_limit_s
        )
        self.broken: StopProcess | None = None  # why the bus can no longer be used
        self._on_broken = on_broken
        self._bus = bus
        self._section = section
        self._secret = secret
        self._open = _is_loopback(section.bind)
        self._sequence = count(1)
        self._warned: set[str] = set()
        self._attempts = Attempts(section.calls_per_attempt_max)
        self.meters = Meters()
        self._tokens = TokenRoute(self.upstreams, self.meters)
        self._calls = Calls(self.upstreams, self._tokens, self.meters, self.record)
        self.traces = Ingest(
            partial(self._append, traces or bus), secret=secret, body_bytes_max=section.body_bytes_max, open_=self._open,
            limit_s=section.admission_wait_s,
        )  # fmt: skip

    def app(self) -> Starlette:
        routes: list[Route] = []
        for prefix in ("/rollout/{rollout_id}/attempt/{attempt:int}", ""):
            for dialect in DIALECTS:
                routes.append(Route(prefix + dialect.route, partial(self.call, dialect), methods=["POST"]))
            routes.append(Route(f"{prefix}{MESSAGES}/count_tokens", self.count_tokens, methods=["POST"]))
            routes.append(Route(prefix + MODELS, self.models, methods=["GET"]))
            # Anthropic's SDK adds the /v1 that OpenAI's expects in its base URL, and agents are given one URL for both.
            routes.append(Route(f"{prefix}/v1{MESSAGES}", partial(self.call, Messages()), methods=["POST"]))
            routes.append(Route(f"{prefix}/v1{MESSAGES}/count_tokens", self.count_tokens, methods=["POST"]))
        routes.append(Route("/health", self.health, methods=["GET"]))
        routes.append(Route("/metrics", self.metrics, methods=["GET"]))
        routes += self.traces.routes()
        return Starlette(routes=routes, exception_handlers=refusals.HANDLERS, lifespan=self._lifespan)

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncGenerator[None]:
        """Where the application is served by someone else. `serve_gateway` does the same by itself."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self.upstreams.watch, self._section.health_check_s)
            try:
                yield
            finally:
                tasks.cancel_scope.cancel()
                with anyio.CancelScope(shield=True):
                    await self.upstreams.aclose()

    async def call(self, dialect: Dialect, request: Request) -> Response:
        """Answer a model call and record it."""
        claims = self._claims(request)
        if self._section.overrides:
            claims = msgspec.structs.replace(claims, overrides={**self._section.overrides, **claims.overrides})
        asked, raw = await self._body(request)
        sent = recording.prepare(_said(dialect, asked), claims, target=dialect.target)
        skewed = recording.skewing_parameters(sent)
        if skewed:
            self._warn_of_skew(skewed, sent)
        trace_id, parent_id = parent_of(request, claims)
        in_its_words = dialect.route == dialect.target and not claims.model and not claims.overrides
        call = Call(
            rollout_id=claims.rollout_id,
            attempt=claims.attempt,
            trace_id=trace_id,
            parent_id=parent_id,
            request=sent,
            request_json=_encode(sent),
            start_ns=wall_ns(),
            retry_count=number(request.headers.get("x-stainless-retry-count")),
            route=dialect.route,
            original_json=b"" if in_its_words else raw,
            agent_name=claims.name or agent_name_of(request),
            user_agent=user_agent_of(request),
        )
        ended = self._begin(claims)
        try:
            response = await self._answered(call, dialect, asked, request, ended)
        except BaseException:
            ended()
            raise
        if not isinstance(response, Relay):  # which goes on when this has returned
            ended()
        return in_shape_of(request.url.path, response)

    async def count_tokens(self, request: Request) -> Response:
        """Tell how many tokens Anthropic's messages are. Not a model call: nothing is recorded."""
        claims = self._claims(request)
        asked, _ = await self._body(request)
        sent = recording.prepare(_said(Messages(), {**asked, "stream": False}), claims)
        about = {name: sent[name] for name in ("model", "messages", "tools", "chat_template_kwargs") if name in sent}
        ask = partial(self.upstreams.call, claims.rollout_id, "POST", model=str(sent.get("model") or ""))
        try:
            answer = await ask(TOKENIZE, _encode(about))
            if answer.status in (404, 405):  # an engine without that route counts a prompt when it answers it
                sent["max_tokens"] = sent["max_completion_tokens"] = 1
                answer = await ask(CHAT, _encode(sent))
        except (BusyError, BrokenError) as exc:
            return in_shape_of(request.url.path, unanswered(exc))
        if answer.status != 200:
            return in_shape_of(request.url.path, by_engine(answer.status, answer.body))
        counted = object_of(answer.body) or {}
        tokens = counted.get("count", len(array(counted.get("prompt_token_ids"))))
        return Response(_encode({"input_tokens": tokens}), media_type="application/json")

    async def models(self, request: Request) -> Response:
        """Name the models of all engines."""
        self._claims(request)
        try:
            models = await self.upstreams.models()
        except (BusyError, BrokenError) as exc:
            return unanswered(exc)
        body = models_page(models) if "anthropic-version" in request.headers else models
        return Response(_encode(body), media_type="application/json")

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
        body = {
            "status": "ok" if healthy else "unavailable", "bus": bus, "upstreams": upstreams,
            "versions": {engine.name: engine.version for engine in self.upstreams.engines},
            "models": {engine.name: sorted(engine.models) for engine in self.upstreams.engines},
        }  # fmt: skip
        return Response(_encode(body), 200 if healthy else 503, media_type="application/json")

    async def metrics(self, request: Request) -> Response:
        """What this gateway has counted, for Prometheus."""
        text = self.meters.text(self.upstreams.engines, self.traces.refused)
        return Response(text, media_type=self.meters.content_type)

    # -- one call

    async def _answered(
        self, call: Call, dialect: Dialect, asked: Json, request: Request, ended: Callable[[], None]
    ) -> Response:
        if call.request["stream"]:
            return await self._calls.stream(call, dialect, asked, ended)
        response: Response | None = None

        async def ask() -> None:
            nonlocal response
            response = await self._calls.whole(call, dialect, asked)
            tasks.cancel_scope.cancel()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(cancel_when_gone, request.receive, tasks.cancel_scope)
            tasks.start_soon(ask)
        if response is None:  # the agent hung up; the engine was told by the closed connection
            await self._calls.record_failure(call, WENT_AWAY)
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        return response

    async def record(self, spans: list[Span], call: Call) -> Response | None:
        """Make the spans durable. Returns None, or the refusal that the agent gets instead of its answer."""
        numbered = [msgspec.structs.replace(span, sequence=next(self._sequence)) for span in spans]
        began_s = monotonic_s()
        outcome, refusal = "ok", None
        try:
            # Once begun an append goes on even if the agent hangs up: the call did happen.
            with anyio.CancelScope(shield=True):
                await self._append(self._bus, call.rollout_id, call.attempt, numbered)
        except FencedError as exc:
            message = f"The attempt is over: {exc} Nothing that this agent still does counts; stop it."
            self._attempts.is_over(call.rollout_id, call.attempt, message)
            self._tokens.prompts.is_over(call.rollout_id, call.attempt)
            outcome, refusal = (
                "fenced",
                error(409, message, "invalid_request_error", code="attempt_over", headers={"x-should-retry": "false"}),
            )
        except (BusyError, BrokenError) as exc:
            outcome, refusal = "not_recorded", unavailable(exc)
        except LightningBusError as exc:
            outcome, refusal = "not_recorded", error(500, str(exc), "server_error", headers={"x-should-retry": "false"})
        else:
            self.meters.ack_s.observe(monotonic_s() - began_s)
        self.meters.recorded(call.route, numbered, outcome)
        return refusal

    async def _append(self, bus: Bus, rollout_id: str, attempt: int, spans: Sequence[Span]) -> None:
        """Make spans durable. A bus that can no longer be used ends the gateway."""
        try:
            await bus.append(rollout_id, attempt, spans)
        except StopProcess as exc:
            self.broken = exc
            self._on_broken()
            raise

    # -- who may call, and how much

    def _claims(self, request: Request) -> Claims:
        try:
            claims = claims_of(request, self._secret, open_=self._open)
            self._attempts.check(claims)
        except Refused:
            self.meters.refused.labels("token").inc()
            raise
        return claims

    async def _body(self, request: Request) -> tuple[Json, bytes]:
        try:
            return await body_of(request, self._section.body_bytes_max)
        except Refused:
            self.meters.refused.labels("body").inc()
            raise

    def _begin(self, claims: Claims) -> Callable[[], None]:
        """Count a call as under way, until the function returned is called."""
        try:
            self._attempts.begin(claims)
        except Refused:
            self.meters.refused.labels("too many calls").inc()
            raise
        self.meters.in_flight.inc()

        def ended() -> None:
            self.meters.in_flight.dec()
            self._attempts.end(claims)

        return ended

    def _warn_of_skew(self, names: Sequence[str], sent: Json) -> None:
        for name in names:
            if name not in self._warned:
                self._warned.add(name)
                _log.warning(
                    "an agent samples with %s=%r: log-probs are of the full softmax, so the calls are slightly off-policy. "
                    "Leave it neutral, or have the submission's overrides set it, to train exactly. Said once.", name, sent[name]
                )  # fmt: skip


def _said(dialect: Dialect, asked: Json) -> Json:
    try:
        return dialect.to_engine(asked)
    except BadRequest as exc:
        raise invalid(400, str(exc)) from exc


def _is_loopback(address: str) -> bool:
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
