"""The OpenTelemetry path: spans are made by its SDK, and by whatever instruments frameworks for it.

    OtelTracer().trace_context(…) ─► attempt's root as remote parent ─► SDK spans ─► Processor ─► the same records

What always holds: a span belongs to the attempt whose place its start saw, so one provider serves any number of
rollouts at a time; no span is sampled away, cut short or dropped by a full queue, as the SDK's own defaults would.
OpenTelemetry is imported when an OtelTracer is made, and not before.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Iterable, Mapping
from contextlib import suppress
from contextvars import Token
from importlib import import_module
from importlib.metadata import entry_points
from types import TracebackType
from typing import Any, cast

from lightning_bus.errors import ConfigError
from lightning_bus.otel.attributes import to_plain
from lightning_bus.otel.context import Place, Store, from_environment, place
from lightning_bus.otel.convert import OUR_SCOPE, convert
from lightning_bus.otel.live import error_line, stacktrace
from lightning_bus.otel.otlp import OtlpSpan
from lightning_bus.otel.queue import quiet
from lightning_bus.otel.tracer import Tracer

# Entry points: OpenTelemetry's, and OpenInference's, whose packages are announced in both.
INSTRUMENTOR_GROUPS = ("opentelemetry_instrumentor", "openinference_instrumentor")
INSTRUMENTED = frozenset(
    {
        "agno", "anthropic", "autogen", "autogen_agentchat", "bedrock", "crewai", "dspy", "google_genai", "groq",
        "haystack", "instructor", "langchain", "litellm", "llama_index", "mcp", "mistralai", "ollama", "openai",
        "openai_agents", "openai_v2", "pydantic_ai", "smolagents", "together", "vertexai",
    }
)  # fmt: skip

COUNT_MAX = 1 << 30  # of attributes and events of a span; the SDK would silently leave out what is beyond 128

_log = logging.getLogger("lightning_bus.otel")
_lock = threading.Lock()
_sides: weakref.WeakKeyDictionary[Any, Sdk] = weakref.WeakKeyDictionary()  # by provider


class OtelTracer(Tracer):
    """A Tracer whose spans are OpenTelemetry's, so that those of instrumented frameworks stand among them.

    enable_otel  False: as Tracer, without OpenTelemetry
    store        where spans go when trace_context does not say
    instrument   switch on the installed instrumentors of model clients and agent frameworks
    provider     an SDK TracerProvider to join; None: the global one, which is made where there is none

    Raises ConfigError when OpenTelemetry's SDK is not installed.
    """

    def __init__(
        self, enable_otel: bool = True, *, store: Store | None = None, instrument: bool = True, provider: Any = None
    ) -> None:
        super().__init__(store)
        if not enable_otel:
            return
        with _lock:
            provider = provider or _global_provider()
            side = _sides.get(provider)
            if side is None:
                side = _sides[provider] = Sdk(provider)
        self._sdk = side
        if instrument:
            side.instrument()


class Sdk:
    """One TracerProvider, seen from our side."""

    def __init__(self, provider: Any) -> None:
        self._api: Any = import_module("opentelemetry.trace")
        self._context: Any = import_module("opentelemetry.context")
        self._provider: Any = weakref.proxy(provider)
        self._instrumented = False
        self.tracer: Any = provider.get_tracer(OUR_SCOPE)
        provider.add_span_processor(_processor(self._api))

    def begin(self, name: str, attributes: Mapping[str, Any]) -> SdkSpan:
        return SdkSpan(self, name, attributes)

    def start(self, name: str, attributes: dict[str, Any]) -> Any:
        return self.tracer.start_span(name, attributes=attributes)

    def current(self, span: Any) -> Any:
        """Make a span the current one; give the result to `detach`."""
        return self._context.attach(self._api.set_span_in_context(span))

    def attach(self, trace_id: bytes, span_id: bytes) -> Any:
        """Make a span that is elsewhere the current one; give the result to `detach`."""
        api = self._api
        remote = api.SpanContext(
            int.from_bytes(trace_id, "big"), int.from_bytes(span_id, "big"), is_remote=True,
            trace_flags=api.TraceFlags(api.TraceFlags.SAMPLED),
        )  # fmt: skip
        return self.current(api.NonRecordingSpan(remote))

    def detach(self, attached: Any) -> None:
        # Not context.detach(), which logs an error for what async generators may rightly do.
        with suppress(ValueError):
            attached.var.reset(attached)

    def parent(self) -> tuple[bytes, bytes] | None:
        """Return trace and span id of the current span, or None."""
        context = self._api.get_current_span().get_span_context()
        return ids_of(context) if context.is_valid else None

    def failed(self, message: str) -> Any:
        return self._api.Status(self._api.StatusCode.ERROR, message)

    def instrument(self) -> None:
        """Switch on the installed instrumentors. One that fails is passed over, with a warning.

        What two of them instrument would be recorded twice: OpenTelemetry's own goes first, and of the others only
        what it left.
        """
        if self._instrumented:
            return
        self._instrumented = True
        found = [entry for group in INSTRUMENTOR_GROUPS for entry in entry_points(group=group)]
        tried: set[str] = set()
        done: set[str] = set()
        for entry in sorted(found, key=lambda entry: not entry.value.startswith("opentelemetry.")):
            name = entry.name.replace("-", "_")
            name = "openai" if name == "openai_v2" else name
            if name not in INSTRUMENTED or name in done or entry.value in tried:
                continue
            tried.add(entry.value)
            try:
                instrumentor = entry.load()()
                if not instrumentor.is_instrumented_by_opentelemetry:
                    instrumentor.instrument(tracer_provider=self._provider)
                done.add(name)
            except Exception as exc:
                _log.warning("instrumentor %s cannot be used: %s", entry.value, exc)


class SdkSpan:
    """A span of the SDK, while it is open."""

    __slots__ = ("_attached", "_attributes", "_before", "_name", "_sdk", "_span")

    def __init__(self, sdk: Sdk, name: str, attributes: Mapping[str, Any]) -> None:
        self._sdk = sdk
        self._name = name
        self._attributes = attributes
        self._span: Any = None
        self._attached: Any = None
        self._before: Token[Place | None] | None = None

    @property
    def trace_id(self) -> bytes:
        return ids_of(self._span.get_span_context())[0]

    @property
    def span_id(self) -> bytes:
        return ids_of(self._span.get_span_context())[1]

    def set_attribute(self, name: str, value: Any) -> None:
        self._span.set_attributes(to_plain({name: value}))

    def set_attributes(self, attributes: Mapping[str, Any]) -> None:
        self._span.set_attributes(to_plain(attributes))

    def record_exception(self, exc: BaseException) -> None:
        self._span.record_exception(exc, attributes={"exception.stacktrace": stacktrace(exc)})
        self._span.set_status(self._sdk.failed(error_line(exc)))

    def __enter__(self) -> SdkSpan:
        self._span = self._sdk.start(self._name, to_plain(self._attributes))
        self._attached = self._sdk.current(self._span)
        now = place.get()
        if now is not None:  # a framework that loses OpenTelemetry's context still finds this span above it
            self._before = place.set(now._replace(trace_id=self.trace_id, span_id=self.span_id))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before is not None:
            with suppress(ValueError):  # left in another context than it was entered in
                place.reset(self._before)
        self._sdk.detach(self._attached)
        if exc is not None:
            self.record_exception(exc)
        self._span.end()

    async def __aenter__(self) -> SdkSpan:
        return self.__enter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.__exit__(kind, exc, trace)


def ids_of(context: Any) -> tuple[bytes, bytes]:
    """Return trace and span id of a SpanContext."""
    return context.trace_id.to_bytes(16, "big"), context.span_id.to_bytes(8, "big")


def read(span: Any) -> OtlpSpan:
    """Return a ReadableSpan of the SDK as OTLP would bring it."""
    trace_id, span_id = ids_of(span.context)
    kind = span.kind.name.lower()
    return OtlpSpan(
        trace_id=trace_id,
        span_id=span_id,
        parent_id=ids_of(span.parent)[1] if span.parent is not None else b"",
        name=span.name,
        kind="" if kind == "internal" else kind,
        start_ns=span.start_time,
        end_ns=span.end_time,
        attributes=dict(span.attributes or {}),
        events=[(event.name, event.timestamp, _fields(event.attributes)) for event in span.events],
        links=[(*ids_of(link.context), _fields(link.attributes)) for link in span.links],
        failed=span.status.status_code.name == "ERROR",
        message=span.status.description or "",
    )


def _fields(attributes: Mapping[str, Any] | None) -> dict[str, Any]:
    items: Iterable[tuple[str, Any]] = (attributes or {}).items()
    return {name: list(cast("tuple[Any, ...]", value)) if isinstance(value, tuple) else value for name, value in items}


def _processor(api: Any) -> Any:
    """Return a SpanProcessor that records spans which began in an attempt."""
    base: Any = import_module("opentelemetry.sdk.trace").SpanProcessor

    class Processor(base):
        def __init__(self) -> None:
            # By span id, from start to end: a span may end in another context than it began in.
            self._open: dict[int, Place] = {}

        def on_start(self, span: Any, parent_context: Any = None) -> None:
            now = None if quiet.get() else place.get() or from_environment()
            if now is not None:
                self._open[span.context.span_id] = now

        def on_end(self, span: Any) -> None:
            now = self._open.pop(span.context.span_id, None)
            if now is None:
                return
            found = read(span)
            # What has no parent here was started where OpenTelemetry's context was lost: in a thread, or by a
            # framework that begins traces of its own.
            found.parent_id = found.parent_id or now.span_id
            attempt = now.attempt
            attempt.put(
                convert(
                    found,
                    rollout_id=attempt.rollout_id,
                    attempt=attempt.attempt,
                    sequence=next(attempt.sequence),
                    scope=span.instrumentation_scope.name if span.instrumentation_scope else "",
                )  # fmt: skip
            )

    return Processor()


def _global_provider() -> Any:
    """Return the process's TracerProvider, of the SDK, made now where there is none."""
    try:
        api: Any = import_module("opentelemetry.trace")
        sdk: Any = import_module("opentelemetry.sdk.trace")
        sampling: Any = import_module("opentelemetry.sdk.trace.sampling")
    except ImportError as exc:
        raise ConfigError(
            f"OtelTracer needs OpenTelemetry's SDK ({exc}). Install lightning-bus[otel], or use Tracer, which needs nothing."
        ) from exc
    provider: Any = api.get_tracer_provider()
    if isinstance(provider, sdk.TracerProvider):
        return provider
    limits = ("attributes", "events", "links", "span_attributes", "event_attributes", "link_attributes")
    unlimited = sdk.SpanLimits(**{f"max_{name}": COUNT_MAX for name in limits})
    # Explicit, because the environment may ask for a sampler and for limits, and recorded is recorded.
    provider = sdk.TracerProvider(sampler=sampling.ALWAYS_ON, span_limits=unlimited)
    api.set_tracer_provider(provider)
    return provider
