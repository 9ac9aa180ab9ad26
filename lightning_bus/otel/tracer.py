"""The light tracer: what an agent does becomes spans, with nothing but the bus installed.

    tracer = Tracer()
    with tracer.trace_context("solve", store=store, rollout_id="r-1", attempt_id=1):
        with tracer.span("search", {"query": query}):
            ...
        tracer.emit_reward(1.0)

Where a worker has already put the code into its attempt, `trace_context("solve")` alone will do, or nothing at all.
What always holds: which rollout a span belongs to is decided by where the code runs (see `context`), never by what the
process did last; and leaving a `trace_context` that named an attempt returns once its spans are durable.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from contextlib import suppress
from contextvars import Token
from types import TracebackType
from typing import Any

from lightning_bus.errors import CallError, LightningBusError
from lightning_bus.otel import emit
from lightning_bus.otel.context import Attempt, Place, Store, from_environment, parent_of, place
from lightning_bus.otel.http import send_traceparent
from lightning_bus.otel.live import LiveSpan, begin
from lightning_bus.otel.threads import carry_into_threads
from lightning_bus.otel.traceparent import root_of_attempt

_NUMBER = re.compile(r"(?:.+[-_])?(\d{1,9})")
_log = logging.getLogger("lightning_bus.otel")


class Tracer:
    """Makes spans of its own. One serves any number of rollouts at a time.

    store  where spans go when trace_context does not say: a SpanExporter
    """

    def __init__(self, store: Store | None = None) -> None:
        self._store = store
        self._sdk: Any = None  # the OpenTelemetry side, in OtelTracer

    def trace_context(
        self, name: str = "trace", *, store: Store | None = None, rollout_id: str | None = None,
        attempt_id: int | str | None = None,
    ) -> TraceContext:  # fmt: skip
        """Return a context, `with` or `async with`, in which everything belongs to this attempt.

        It is a span itself. Without a rollout_id it is the attempt that the code already runs in. An attempt_id is
        the attempt's number, also as text ("2", "attempt-2"); None: the first.
        """
        return TraceContext(self, name, store or self._store, rollout_id, attempt_id, self._sdk)

    def span(self, name: str, attributes: Mapping[str, Any] | None = None) -> LiveSpan:
        """Return a span, to be entered by `with` or `async with`."""
        return begin(name, attributes)

    start_as_current_span = span  # as OpenTelemetry's tracers call it

    operation = staticmethod(emit.operation)
    emit_reward = staticmethod(emit.emit_reward)
    emit_annotation = staticmethod(emit.emit_annotation)
    emit_message = staticmethod(emit.emit_message)
    emit_object = staticmethod(emit.emit_object)
    emit_exception = staticmethod(emit.emit_exception)


class TraceContext:
    """An attempt, as a context manager. Entering it gives the tracer, or OpenTelemetry's where it makes the spans."""

    def __init__(
        self, tracer: Tracer, name: str, store: Store | None, rollout_id: str | None, attempt_id: int | str | None,
        sdk: Any,
    ) -> None:  # fmt: skip
        self._tracer = tracer
        self._name = name
        self._store = store
        self._rollout_id = rollout_id
        self._attempt_id = attempt_id
        self._sdk = sdk
        self._before: Token[Place | None] | None = None
        self._attached: Any = None

    def __enter__(self) -> Any:
        self._enter()
        return self._tracer if self._sdk is None else self._sdk.tracer

    async def __aenter__(self) -> Any:
        return self.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._exit(kind, exc, trace)
        if self._flushes:
            try:
                self._attempt.store.flush(self._attempt.key)
            except LightningBusError as error:
                self._on_flush_error(error, exc)

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._exit(kind, exc, trace)
        if self._flushes:
            try:
                await self._attempt.store.wait_flushed(self._attempt.key)
            except LightningBusError as error:
                self._on_flush_error(error, exc)

    def _enter(self) -> None:
        carry_into_threads()
        send_traceparent()
        inherited = place.get()
        now = inherited or from_environment()
        self._attempt = attempt = self._find(now)
        # Whoever put us into an attempt sees to its spans; where it was the environment, or nobody, we do.
        self._flushes = inherited is None or attempt is not inherited.attempt
        above = root_of_attempt(*attempt.key) if now is None or now.attempt.key != attempt.key else parent_of(now)
        self._before = place.set(Place(attempt, *above, self._sdk))
        if self._sdk is not None:
            self._attached = self._sdk.attach(*above)
        self._span = begin(self._name)
        self._span.__enter__()

    def _exit(self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None) -> None:
        assert self._before is not None
        self._span.__exit__(kind, exc, trace)
        if self._sdk is not None:
            self._sdk.detach(self._attached)
        with suppress(ValueError):  # left in another context than it was entered in, as async generators may be
            place.reset(self._before)

    def _find(self, now: Place | None) -> Attempt:
        if self._rollout_id is None:
            if now is None:
                raise CallError(
                    f"trace_context({self._name!r}) names no rollout_id, and the code runs in no attempt. "
                    "Name rollout_id, attempt_id and store, or run it in a worker."
                )
            return now.attempt
        number = attempt_number(self._attempt_id)
        same = now is not None and now.attempt.key == (self._rollout_id, number)
        if now is not None and same and self._store in (None, now.attempt.store):
            return now.attempt
        if self._store is None:
            raise CallError(
                f"trace_context({self._name!r}) for rollout {self._rollout_id} has no store, so its spans have nowhere "
                'to go. Give it one: store=SpanExporter("tcp://127.0.0.1:4750").'
            )
        store: Any = self._store
        address, token = getattr(store, "address", ""), getattr(store, "token", "")
        return Attempt(self._rollout_id, number, self._store, address, token)

    def _on_flush_error(self, error: LightningBusError, exc: BaseException | None) -> None:
        if exc is None:
            raise error
        _log.error("spans of rollout %s attempt %d: %s", *self._attempt.key, error)  # what was raised first goes on


def attempt_number(attempt_id: int | str | None) -> int:
    """Return an attempt's number. Raises ValueError for what names none."""
    if attempt_id is None:
        return 1
    match = _NUMBER.fullmatch(str(attempt_id))
    if match is None or int(match[1]) < 1:
        raise ValueError(f"attempt_id is {attempt_id!r}; a number from 1 on is wanted, as the broker gave it")
    return int(match[1])
