"""The exporter: a queue of spans with a thread of its own, which talks to the broker or to the gateway.

    SpanExporter("tcp://127.0.0.1:4750")                      to the broker
    SpanExporter("http://127.0.0.1:4751", token=api_key)      through the gateway, as the attempt that the token names

The thread begins with the first span and is a daemon; what is waiting when the process ends is flushed first. A process
that was forked starts anew: it has none of its parent's spans, which the parent sends, and a connection of its own.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import multiprocessing
import multiprocessing.util
import os
import threading
import weakref
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from importlib import import_module
from pathlib import Path
from types import TracebackType

import anyio
import httpx
import msgspec

from lightning_bus.client import Client
from lightning_bus.errors import (
    AccessDenied,
    BrokenError,
    CallError,
    ClosedError,
    ConfigError,
    FencedError,
    LightningBusError,
    MessageTooLarge,
    first_error,
)
from lightning_bus.otel.queue import BYTES_MAX, FLUSH_LIMIT_S, WAIT_S, Sink, SpanQueue, quiet
from lightning_bus.otel.sink import CHUNK, TRACES
from lightning_bus.spans import Span

LIMIT_S = 60.0  # a broker that restarts and reopens its log is back well within this
EXIT_LIMIT_S = 10.0  # a process that ends waits this long for its last spans
RETRY_S_MIN, RETRY_S_MAX = 0.1, 2.0

_log = logging.getLogger("lightning_bus.otel")
_alive: weakref.WeakSet[SpanExporter] = weakref.WeakSet()


class SpanExporter(SpanQueue):
    """Makes spans durable in the background. Close it, or use it inside `with`, to be sure of the last ones.

    address  of the broker (tcp://, ipc://) or of the gateway (http://, https://)
    token    the attempt's API key; the gateway wants it, and so does a broker with keys
    """

    def __init__(
        self, address: str, *, token: str = "", key: Path | None = None, limit_s: float = LIMIT_S,
        bytes_max: int = BYTES_MAX, wait_s: float = WAIT_S,
    ) -> None:  # fmt: skip
        if "://" not in address:
            raise ConfigError(
                f"{address!r} is no address. Write it like tcp://127.0.0.1:4750 (the broker) or "
                "http://127.0.0.1:4751 (the gateway)."
            )
        super().__init__(bytes_max=bytes_max, wait_s=wait_s)
        self.address = address
        self.token = token
        self._key = key
        self._limit_s = limit_s
        self._closed = False
        self._thread: threading.Thread | None = None
        self._stop: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None
        _alive.add(self)

    def put(self, span: Span) -> None:
        if self._closed:
            raise ClosedError(f"the exporter to {self.address} was closed before span {span.name!r} ended")
        super().put(span)
        if self._thread is None:
            self._start()

    def close(self, *, limit_s: float = FLUSH_LIMIT_S) -> None:
        """Flush, then end the thread. Raises what `flush` raises, with everything closed."""
        self._closed = True
        try:
            self.flush(limit_s=limit_s)
        finally:
            thread, stop = self._thread, self._stop
            if stop is not None:
                with suppress(RuntimeError):
                    stop[0].call_soon_threadsafe(stop[1].set)
            if thread is not None:
                thread.join(limit_s)

    def __enter__(self) -> SpanExporter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(self) -> None:
        with self._changed:
            if self._thread is not None:
                return
            self._thread = threading.Thread(target=self._work, name=f"spans to {self.address}", daemon=True)
        # Here and not in the thread: a process that is forked while its thread imports has half a module for ever.
        with suppress(ImportError):
            import_module("anyio._backends._asyncio")
        if multiprocessing.parent_process() is not None:  # such a process ends without atexit
            multiprocessing.util.Finalize(None, _flush_at_exit, exitpriority=0)
        self._thread.start()

    def _work(self) -> None:
        quiet.set(True)
        error: LightningBusError = BrokenError(f"the exporter to {self.address} ended")
        try:
            anyio.run(self._serve)
        except BaseException as exc:
            inner = first_error(exc)
            error = inner if isinstance(inner, LightningBusError) else BrokenError(f"the exporter failed: {inner!r}")
        with self._changed:
            self._thread = self._stop = None  # the next span tries again
        self.fail_waiting(error)

    async def _serve(self) -> None:
        self._stop = asyncio.get_running_loop(), asyncio.Event()
        async with self._connected() as sink, anyio.create_task_group() as tasks:
            tasks.start_soon(self.run, sink)
            await self._stop[1].wait()
            tasks.cancel_scope.cancel()

    @asynccontextmanager
    async def _connected(self) -> AsyncGenerator[Sink]:
        if self.address.startswith(("http://", "https://")):
            async with httpx.AsyncClient(timeout=self._limit_s) as http:
                yield GatewaySink(http, self.address, self.token, self._limit_s)
        else:
            async with Client(
                self.address, role="agent", key=self._key, token=self.token, limit_s=self._limit_s
            ) as bus:
                yield bus

    def _after_fork(self) -> None:
        self._reset()
        self._thread = self._stop = None


class GatewaySink:
    """Spans by way of the gateway: for agents that have a token and no way to the broker."""

    def __init__(self, http: httpx.AsyncClient, url: str, token: str, limit_s: float) -> None:
        self._http = http
        self._url = url.rstrip("/").removesuffix("/v1") + TRACES
        self._headers = {"content-type": CHUNK, **({"authorization": f"Bearer {token}"} if token else {})}
        self._limit_s = limit_s

    async def append_blob(self, rollout_id: str, attempt: int, blob: bytes, count: int) -> None:
        """Send a chunk until it is taken; the gateway knows spans that it has already."""
        until_s, pause_s = anyio.current_time() + self._limit_s, RETRY_S_MIN
        while True:
            try:
                answer = await self._http.post(self._url, content=blob, headers=self._headers)
            except httpx.HTTPError as exc:
                why = str(exc) or type(exc).__name__
            else:
                if answer.status_code == 200:
                    return
                why = f"{answer.status_code} {_message(answer)}"
                if answer.status_code not in (429, 502, 503, 504):
                    raise _ERRORS.get(answer.status_code, CallError)(f"{self._url}: {_message(answer)}")
            if anyio.current_time() + pause_s > until_s:
                raise BrokenError(f"{self._url} took no spans within {self._limit_s:g} s ({why}). Is the gateway up?")
            await anyio.sleep(pause_s)
            pause_s = min(2 * pause_s, RETRY_S_MAX)


_ERRORS: dict[int, type[LightningBusError]] = {403: AccessDenied, 409: FencedError, 413: MessageTooLarge}


def _message(answer: httpx.Response) -> str:
    try:
        return str(msgspec.json.decode(answer.content)["message"])
    except (msgspec.DecodeError, TypeError, KeyError):
        return answer.text[:200]


def _flush_at_exit() -> None:
    for exporter in list(_alive):
        try:
            exporter.flush(limit_s=EXIT_LIMIT_S)
        except LightningBusError as exc:
            _log.error("the process ends and spans to %s were not recorded: %s", exporter.address, exc)


def _forget_after_fork() -> None:
    for exporter in list(_alive):
        exporter._after_fork()  # pyright: ignore[reportPrivateUsage]


atexit.register(_flush_at_exit)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_after_fork)
