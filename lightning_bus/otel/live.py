"""A span while it is open: a context manager in sync and async code alike.

    with begin("search", {"query": q}) as span:
        span.set_attribute("hits", 3)

Which kind it is, of our own or of OpenTelemetry's SDK, follows from the attempt that the code runs in; what ends in the
log is the same.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Mapping
from contextlib import suppress
from contextvars import Token
from types import TracebackType
from typing import Any, Protocol

from lightning_bus.clock import wall_ns
from lightning_bus.otel.attributes import exception_attributes, type_name
from lightning_bus.otel.context import Place, here, parent_of, place
from lightning_bus.otel.threads import carry_into_threads


class LiveSpan(Protocol):
    """What one may do with a span that is open."""

    @property
    def trace_id(self) -> bytes: ...
    @property
    def span_id(self) -> bytes: ...
    def set_attribute(self, name: str, value: Any) -> None: ...
    def set_attributes(self, attributes: Mapping[str, Any]) -> None: ...
    def record_exception(self, exc: BaseException) -> None: ...
    def __enter__(self) -> LiveSpan: ...
    def __exit__(self, kind: Any, exc: BaseException | None, trace: Any) -> None: ...
    async def __aenter__(self) -> LiveSpan: ...
    async def __aexit__(self, kind: Any, exc: BaseException | None, trace: Any) -> None: ...


def begin(name: str, attributes: Mapping[str, Any] | None = None) -> LiveSpan:
    """Return a span to be entered, under whatever is open where the code runs. Raises CallError outside an attempt."""
    now = here()
    if place.get() is None:  # it was the environment that told, and no trace_context
        carry_into_threads()
    return now.sdk.begin(name, attributes or {}) if now.sdk is not None else LightSpan(name, attributes or {})


def record_at_once(name: str, attributes: Mapping[str, Any]) -> LiveSpan:
    """Record something that takes no time, and return its span."""
    span = begin(name, attributes)
    with span:
        return span


def error_line(exc: BaseException) -> str:
    """Return an exception as a span's error."""
    return f"{type_name(type(exc))}: {exc}"


def stacktrace(exc: BaseException) -> str:
    return "".join(traceback.format_exception(exc))


class LightSpan:
    """A span of our own."""

    __slots__ = ("_attributes", "_before", "_error", "_name", "_now", "_parent_id", "_start_ns", "span_id", "trace_id")

    def __init__(self, name: str, attributes: Mapping[str, Any]) -> None:
        self._name = name
        self._attributes = dict(attributes)
        self._error = ""
        self.span_id = os.urandom(8)
        self.trace_id = b""
        self._now: Place | None = None
        self._before: Token[Place | None] | None = None

    def set_attribute(self, name: str, value: Any) -> None:
        self._attributes[name] = value

    def set_attributes(self, attributes: Mapping[str, Any]) -> None:
        self._attributes.update(attributes)

    def record_exception(self, exc: BaseException) -> None:
        """Have the span say that it failed, and how."""
        self._attributes.update(exception_attributes(exc, stacktrace(exc)))
        self._error = error_line(exc)

    def __enter__(self) -> LightSpan:
        now = here()
        self.trace_id, self._parent_id = parent_of(now)
        self._now = now._replace(trace_id=self.trace_id, span_id=self.span_id)
        self._before = place.set(self._now)
        self._start_ns = wall_ns()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._now is not None and self._before is not None
        end_ns = max(wall_ns(), self._start_ns)
        with suppress(ValueError):  # left in another context than it was entered in, as async generators may be
            place.reset(self._before)
        if exc is not None:
            self.record_exception(exc)
        self._now.attempt.record(
            self._name,
            self.span_id,
            self.trace_id,
            self._parent_id,
            self._start_ns,
            end_ns,
            self._attributes,
            self._error,
        )

    async def __aenter__(self) -> LightSpan:
        return self.__enter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.__exit__(kind, exc, trace)
