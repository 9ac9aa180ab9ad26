"""Where the code that runs now stands: in which attempt, and under which span.

Nothing here belongs to the process as a whole: the place is in a context variable, so any number of rollouts may run
in one process, in tasks and in threads. Code that was started with no place, as a subprocess is, finds it in the
environment, where whoever starts it puts `environment()`:

    subprocess.run([...], env={**os.environ, **environment()})

    TRACEPARENT                                    the span it was started under (W3C Trace Context)
    LIGHTNING_BUS_ROLLOUT, LIGHTNING_BUS_ATTEMPT   whose work it is
    LIGHTNING_BUS_ADDRESS, LIGHTNING_BUS_TOKEN     where its spans go: to the broker or the gateway, and as whom
    OTEL_EXPORTER_OTLP_TRACES_*                    the same for OpenTelemetry SDKs of any language, through the gateway
"""

from __future__ import annotations

import os
import threading
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import count
from typing import Any, NamedTuple, Protocol

from lightning_bus.errors import CallError
from lightning_bus.otel.attributes import to_plain, to_record
from lightning_bus.otel.exporter import SpanExporter
from lightning_bus.otel.names import REWARD, REWARD_SPAN, translate
from lightning_bus.otel.queue import FLUSH_LIMIT_S, Key
from lightning_bus.otel.traceparent import format_traceparent, parse_traceparent, root_of_attempt
from lightning_bus.spans import Span, reward_of

TRACEPARENT = "TRACEPARENT"
ROLLOUT_ENV, ATTEMPT_ENV = "LIGHTNING_BUS_ROLLOUT", "LIGHTNING_BUS_ATTEMPT"
ADDRESS_ENV, TOKEN_ENV = "LIGHTNING_BUS_ADDRESS", "LIGHTNING_BUS_TOKEN"
_OTLP = "OTEL_EXPORTER_OTLP_TRACES_"


class Store(Protocol):
    """Where finished spans go."""

    def put(self, span: Span) -> None: ...
    def flush(self, key: Key | None = None, *, limit_s: float = FLUSH_LIMIT_S) -> None: ...
    async def wait_flushed(self, key: Key | None = None, *, limit_s: float = FLUSH_LIMIT_S) -> None: ...


@dataclass(slots=True, eq=False)
class Attempt:
    """One attempt as this process records it.

    address, token  where a process that this one starts sends its spans; empty: it has nowhere to
    """

    rollout_id: str
    attempt: int
    store: Store
    address: str = ""
    token: str = field(default="", repr=False)
    reward: float | None = None  # the last one emitted here for the rollout itself
    sequence: count[int] = field(default_factory=lambda: count(1))

    @property
    def key(self) -> Key:
        return self.rollout_id, self.attempt

    def environment(self, above: tuple[bytes, bytes] | None = None) -> dict[str, str]:
        """Return the variables for a process that works on this attempt, under a span (trace id, span id) or its root."""
        found = {
            TRACEPARENT: format_traceparent(*(above or root_of_attempt(*self.key))), ROLLOUT_ENV: self.rollout_id,
            ATTEMPT_ENV: str(self.attempt), ADDRESS_ENV: self.address, TOKEN_ENV: self.token,
        }  # fmt: skip
        if self.address.startswith("http") and self.token:
            url = f"{self.address.rstrip('/')}/rollout/{self.rollout_id}/attempt/{self.attempt}"
            found[f"{_OTLP}ENDPOINT"] = f"{url}/v1/traces"
            found[f"{_OTLP}HEADERS"] = f"authorization=Bearer%20{self.token}"
            found[f"{_OTLP}PROTOCOL"] = "http/protobuf"
        return found

    def put(self, span: Span) -> None:
        """Record a finished span of this attempt."""
        attributes = span.attributes
        if REWARD in attributes and REWARD_SPAN not in attributes:
            self.reward = reward_of(span)
        self.store.put(span)

    def record(
        self, name: str, span_id: bytes, trace_id: bytes, parent_id: bytes | None, start_ns: int, end_ns: int,
        attributes: dict[str, Any], error: str = "",
    ) -> None:  # fmt: skip
        """Record what a tracer of ours has finished."""
        span = Span(
            span_id, trace_id, parent_id, translate(name), start_ns, end_ns, to_record(to_plain(attributes)), self.rollout_id,
            self.attempt, next(self.sequence), error,
        )  # fmt: skip
        self.put(span)


class Place(NamedTuple):
    """An attempt, and the span under which what begins now belongs."""

    attempt: Attempt
    trace_id: bytes
    span_id: bytes
    sdk: Any = None  # the OpenTelemetry side, where spans of this attempt are made by its SDK (see `sdk`)


place: ContextVar[Place | None] = ContextVar("lightning_bus_place", default=None)


def here() -> Place:
    """Return the place of the code that runs now. Raises CallError where there is none."""
    found = place.get() or from_environment()
    if found is None:
        raise CallError(
            "no attempt is being traced here. Do it inside `with tracer.trace_context(...)`; in a thread of another "
            "library's pool run it by contextvars.copy_context().run; in a subprocess give it the variables of environment()."
        )
    return found


def traceparent() -> str:
    """Return the W3C traceparent of the code that runs now, to be sent along with what it asks of others."""
    now = here()
    return format_traceparent(*parent_of(now))


def environment() -> dict[str, str]:
    """Return the variables by which a process that is started now finds its attempt and its parent span."""
    now = here()
    return now.attempt.environment(parent_of(now))


@contextmanager
def entered(attempt: Attempt) -> Generator[Attempt]:
    """Have everything in this context belong to an attempt, under its root: what a worker does around an agent."""
    before = place.set(Place(attempt, *root_of_attempt(*attempt.key)))
    try:
        yield attempt
    finally:
        place.reset(before)


def parent_of(now: Place) -> tuple[bytes, bytes]:
    """Return trace and span that hang above what begins at this place."""
    if now.sdk is not None:
        return now.sdk.parent() or (now.trace_id, now.span_id)
    return now.trace_id, now.span_id


def from_environment() -> Place | None:
    """Return the place that this process was started at, or None. Raises CallError where half of it is missing."""
    rollout_id = os.environ.get(ROLLOUT_ENV, "")
    if not rollout_id:
        return None
    address, number = os.environ.get(ADDRESS_ENV, ""), os.environ.get(ATTEMPT_ENV, "")
    if not address or not number.isdecimal():
        raise CallError(
            f"{ROLLOUT_ENV} is {rollout_id!r}, {ATTEMPT_ENV} {number!r} and {ADDRESS_ENV} {address!r}: all three are "
            "needed. Take them from environment() of lightning_bus."
        )
    token = os.environ.get(TOKEN_ENV, "")
    parent = parse_traceparent(os.environ.get(TRACEPARENT, "")) or root_of_attempt(rollout_id, int(number))
    found = _attempt_of_process(rollout_id, int(number), address, token)
    return Place(found, *parent)


def exporter_to(address: str, token: str = "") -> SpanExporter:
    """Return this process's exporter to an address, started on its first span and flushed when the process ends."""
    with _lock:
        exporter = _exporters.get((address, token))
        if exporter is None:
            exporter = _exporters[address, token] = SpanExporter(address, token=token)
        return exporter


def _attempt_of_process(rollout_id: str, number: int, address: str, token: str) -> Attempt:
    exporter = exporter_to(address, token)
    with _lock:
        attempt = _attempts.get((rollout_id, number))
        if attempt is None or attempt.store is not exporter:
            # One at a time: a worker that changes its environment goes on to the next attempt.
            _attempts.clear()
            attempt = _attempts[rollout_id, number] = Attempt(rollout_id, number, exporter, address, token)
        return attempt


_lock = threading.Lock()
_exporters: dict[tuple[str, str], SpanExporter] = {}
_attempts: dict[Key, Attempt] = {}
