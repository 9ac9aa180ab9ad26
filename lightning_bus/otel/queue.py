"""Finished spans on their way from the agent's threads to the log.

    put ──► waiting ──► on its way ──► durable
             └──── together at most bytes_max ────┘

What always holds: `put` takes a few microseconds and no round trip; no span is dropped silently. While bytes_max are
not yet durable, `put` waits up to wait_s for room and then raises BusyError. What the bus refuses is counted, logged
once for each attempt, and raised by the next `flush` of that attempt. Spans are encoded when they are put, so that what
happens to their attributes afterwards changes nothing, and so that the bound is in bytes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable
from contextvars import ContextVar
from typing import Protocol

import anyio
import msgspec

from lightning_bus.errors import BrokenError, BusyError, CallError, LightningBusError, MessageTooLarge
from lightning_bus.otel.attributes import encodable
from lightning_bus.otel.sink import append_whole, join_spans
from lightning_bus.spans import Span

BYTES_MAX = 64 << 20
WAIT_S = 5.0  # how long an agent may be held up while the bus is behind
FLUSH_LIMIT_S = 90.0  # more than the client's own limit, so that the error that one hears is the client's
ERRORS_MAX = 1000  # kept for attempts that nobody has flushed since; the log has told of each
LINGER_S = 0.005  # what is finished meanwhile travels together

Key = tuple[str, int]  # rollout and attempt

quiet: ContextVar[bool] = ContextVar("lightning_bus_quiet", default=False)
"""True where spans are being sent. What an instrumented HTTP client does there is no work of an agent, and recording
it would make more to send, for ever."""

_log = logging.getLogger("lightning_bus.otel")
_encode = msgspec.msgpack.Encoder().encode


class Sink(Protocol):
    """Makes spans durable. `Client` is one."""

    async def append_blob(self, rollout_id: str, attempt: int, blob: bytes, count: int) -> None: ...


class SpanQueue:
    """Takes spans from any thread. `run` must be running in an event loop for them to get anywhere."""

    def __init__(self, *, bytes_max: int = BYTES_MAX, wait_s: float = WAIT_S) -> None:
        self.kept = 0  # spans that are durable
        self.lost = 0  # spans that were refused, or whose fate is unknown
        self._bytes_max = bytes_max
        self._wait_s = wait_s
        self._reset()

    def _reset(self) -> None:
        self._changed = threading.Condition(threading.Lock())
        self._waiting: list[tuple[Key, bytes]] = []
        self._bytes = 0  # waiting or on their way
        self._open: dict[Key, int] = {}  # spans waiting or on their way
        self._errors: dict[Key, LightningBusError] = {}
        self._watchers: list[Callable[[], None]] = []  # called when something became durable, or was lost
        self._wake: Callable[[], None] | None = None
        self._awake = False
        self._loop_thread = 0

    def put(self, span: Span) -> None:
        """Take a finished span. Raises BusyError when there was no room for it within wait_s."""
        try:
            encoded = _encode(span)
        except (UnicodeEncodeError, OverflowError, TypeError):
            facts = {name: encodable(getattr(span, name)) for name in ("name", "attributes", "error")}
            encoded = _encode(msgspec.structs.replace(span, **facts))
        key = (span.rollout_id, span.attempt)
        with self._changed:
            if self._bytes and self._bytes + len(encoded) > self._bytes_max:
                self._wait_for_room(len(encoded))
            self._waiting.append((key, encoded))
            self._bytes += len(encoded)
            self._open[key] = self._open.get(key, 0) + 1
            wake = None if self._awake else self._wake
            self._awake = self._awake or wake is not None
        if wake is not None:
            wake()

    def flush(self, key: Key | None = None, *, limit_s: float = FLUSH_LIMIT_S) -> None:
        """Return when what was put, of one attempt or of all, is durable.

        Raises what the bus refused spans with, FencedError for one where the attempt is over, and BrokenError when
        they are not durable after limit_s.
        """
        with self._changed:
            if self._is_open(key) and threading.get_ident() == self._loop_thread:
                raise CallError(
                    "flush() would wait for the very thread that it stops. Use `await wait_flushed()` here."
                )
            self._changed.wait_for(lambda: not self._is_open(key), limit_s)
            self._check(key, limit_s)

    async def wait_flushed(self, key: Key | None = None, *, limit_s: float = FLUSH_LIMIT_S) -> None:
        """As `flush`, for a task of an event loop."""
        loop, event = asyncio.get_running_loop(), asyncio.Event()

        def notify() -> None:
            with contextlib.suppress(RuntimeError):  # its loop has ended
                loop.call_soon_threadsafe(event.set)

        with self._changed:
            self._watchers.append(notify)
        try:
            with anyio.move_on_after(limit_s):
                while self._is_open(key):
                    await event.wait()
                    event.clear()
        finally:
            with self._changed:
                self._watchers.remove(notify)
        with self._changed:
            self._check(key, limit_s)

    async def run(self, sink: Sink) -> None:
        """Make durable what is put, for ever. One at a time may run."""
        loop, woken = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is ending; what was put waits for the next one
                loop.call_soon_threadsafe(woken.set)

        with self._changed:
            self._wake, self._awake, self._loop_thread = wake, True, threading.get_ident()
        try:
            async with anyio.create_task_group() as tasks:
                while True:
                    taken = self._take()
                    if not taken:
                        await woken.wait()
                        woken.clear()
                        continue
                    for key, encoded in taken.items():
                        tasks.start_soon(self._carry, sink, key, encoded)
                    await anyio.sleep(LINGER_S)
        finally:
            with self._changed:
                self._wake, self._awake, self._loop_thread = None, False, 0

    def fail_waiting(self, error: LightningBusError) -> None:
        """Give up what waits: there is no way to the bus."""
        for key, encoded in self._take().items():
            self._settle(key, encoded, len(encoded), error)

    async def _carry(self, sink: Sink, key: Key, encoded: list[bytes]) -> None:
        error: LightningBusError | None = BrokenError("the exporter was closed before these spans were acknowledged")
        lost = len(encoded)
        try:
            lost = await append_whole(lambda some: sink.append_blob(*key, join_spans(some), len(some)), encoded)
            error = None
            if lost:
                size = max(map(len, encoded))
                error = MessageTooLarge(
                    f"{lost} span(s) are larger than a message carries, the largest {size} bytes. "
                    "Record a path or a digest instead of the thing."
                )
        except LightningBusError as exc:
            error = exc
        finally:
            self._settle(key, encoded, lost, error)

    def _take(self) -> dict[Key, list[bytes]]:
        with self._changed:
            waiting, self._waiting = self._waiting, []
            self._awake = bool(waiting)
        taken: dict[Key, list[bytes]] = {}
        for key, encoded in waiting:
            taken.setdefault(key, []).append(encoded)
        return taken

    def _settle(self, key: Key, encoded: list[bytes], lost: int, error: LightningBusError | None) -> None:
        """These spans are durable, or lost for a reason."""
        with self._changed:
            self._bytes -= sum(map(len, encoded))
            self._open[key] -= len(encoded)
            if not self._open[key]:
                del self._open[key]
            self.kept += len(encoded) - lost
            self.lost += lost
            first = error is not None and key not in self._errors
            if error is not None:
                self._errors[key] = error
                if len(self._errors) > ERRORS_MAX:
                    del self._errors[next(iter(self._errors))]
            self._changed.notify_all()
            watchers = list(self._watchers)
        for notify in watchers:
            notify()
        if first:
            _log.warning("rollout %s attempt %d: %d span(s) were not recorded: %s", *key, lost, error)

    def _wait_for_room(self, size: int) -> None:
        # In the exporter's own thread nothing becomes durable while one waits.
        wait_s = 0.0 if threading.get_ident() == self._loop_thread else self._wait_s
        if not self._changed.wait_for(lambda: not self._bytes or self._bytes + size <= self._bytes_max, wait_s):
            raise BusyError(
                f"{self._bytes} bytes of spans are not yet durable, the limit is {self._bytes_max}, and there was no "
                f"room for {size} more within {wait_s:g} s. Is the broker up, and is its disk keeping up?"
            )

    def _is_open(self, key: Key | None) -> bool:
        return bool(self._open) if key is None else key in self._open

    def _check(self, key: Key | None, limit_s: float) -> None:
        if self._is_open(key):
            open_ = self._open.values() if key is None else [self._open[key]]
            raise BrokenError(
                f"{sum(open_)} span(s) were not durable after {limit_s:g} s. Is the broker up? They are still being sent."
            )
        if key is not None:
            error = self._errors.pop(key, None)
        else:
            error = next(iter(self._errors.values()), None)
            self._errors.clear()
        if error is not None:
            raise error
