"""One conversation with a broker: ask, send again until answered, give up at the limit.

Every request is safe to send again, so silence has one cure. Answers find their request by its number; what comes
unasked (tasks) goes to whoever registered for it.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Generic, TypeVar

import anyio

from lightning_bus import errors, wire
from lightning_bus import messages as m
from lightning_bus.clock import monotonic_s
from lightning_bus.errors import BrokenError, BusyError, ClosedError, LightningBusError, RemoteProtocolError
from lightning_bus.transport import Channel, connect_dealer

B = TypeVar("B", bound=m.Body)
V = TypeVar("V")

RESEND_S = 1.0  # an unanswered request is sent again after this
CONNECT_S = 0.02  # and one that found no connection after this


class Session:
    """A named producer's connection. Open it as a context manager; tasks of one event loop share it."""

    def __init__(self, address: str, role: str, limit_s: float) -> None:
        self.address = address
        self.producer = f"{role}-{secrets.token_hex(6)}"
        self.limit_s = limit_s
        self.on_task: Callable[[m.Task], None] | None = None
        self._role = role
        self._channel: Channel | None = None
        self._pending: dict[int, Reply[wire.Message]] = {}
        self._request = 0
        self._welcome: m.Welcome | None = None
        self._tasks: Any = None

    async def __aenter__(self) -> Session:
        self._channel = connect_dealer(self.address, self.producer)
        self._tasks = anyio.create_task_group()
        await self._tasks.__aenter__()
        self._tasks.start_soon(self._read)
        try:
            self._welcome = await self.ask(m.Hello(self._role, nonce=secrets.token_bytes(8)), m.Welcome)
        except BaseException as exc:
            await self.__aexit__(type(exc), exc, exc.__traceback__)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tasks.cancel_scope.cancel()
        try:
            await self._tasks.__aexit__(None, None, None)
        finally:
            if self._channel is not None:
                self._channel.close()
            self._channel = None
            self._fail_all(ClosedError(f"the client of {self.address} was closed while this call waited"))

    @property
    def welcome(self) -> m.Welcome:
        """The broker's terms, as it last stated them."""
        assert self._welcome is not None, "the session is open"
        return self._welcome

    async def greet_again(self) -> m.Welcome:
        """Begin a new epoch, after a batch that was refused or whose fate is unknown.

        Its number cannot be given to another batch: a copy of it may still be under way, and the broker would take
        the one that comes second for a resend of the first, and acknowledge it unkept. In a new epoch it is fenced.
        """
        self._welcome = await self.ask(m.Hello(self._role, self.welcome.epoch, secrets.token_bytes(8)), m.Welcome)
        return self._welcome

    async def ask(self, body: m.Body, kind: type[B], blobs: Sequence[bytes] = (), **how: Any) -> B:
        """Return the broker's answer, which must be of that kind. Otherwise as `exchange`."""
        message = await self.exchange(body, blobs, **how)
        if not isinstance(message.body, kind):
            answered = type(message.body).__name__
            raise RemoteProtocolError(f"the broker answered with {answered} where {kind.__name__} was due")
        return message.body

    async def exchange(
        self, body: m.Body, blobs: Sequence[bytes] = (), *, seq: int = 0, count: int = 0, resend_s: float = RESEND_S,
        limit_s: float | None = None,
    ) -> wire.Message:  # fmt: skip
        """Send until answered. Raises what the broker answers with, or BrokenError when it does not within the limit."""
        limit_s = self.limit_s if limit_s is None else limit_s
        self._request += 1
        request = self._request
        frames = wire.encode(
            body, blobs, request=request, producer=self.producer, epoch=self._epoch, seq=seq, count=count,
            deadline_ms=int(limit_s * 1000) if limit_s != float("inf") else 0,
        )  # fmt: skip
        reply = self._pending[request] = Reply[wire.Message]()
        until_s = monotonic_s() + limit_s
        try:
            while monotonic_s() < until_s:
                wait_s = resend_s if self.open_channel().send(frames) else CONNECT_S
                with anyio.move_on_after(min(wait_s, until_s - monotonic_s())):
                    return await reply.wait()
        finally:
            del self._pending[request]
        raise BrokenError(
            f"the broker at {self.address} did not answer {wire.op_of(body).name} within {limit_s:g} s. "
            "Is it running? Start it with: lightning-bus broker"
        )

    def tell(self, body: m.Body) -> None:
        """Send once and wait for nothing; for what the broker finds out by itself when it is lost."""
        if self._channel is not None:
            self._channel.send(wire.encode(body, producer=self.producer, epoch=self._epoch))

    def open_channel(self) -> Channel:
        """Return the connection. Raises ClosedError outside the context."""
        if self._channel is None:
            raise ClosedError(f"the client of {self.address} is closed; use it inside `async with`")
        return self._channel

    @property
    def _epoch(self) -> int:
        return 0 if self._welcome is None else self._welcome.epoch

    async def _read(self) -> None:
        channel = self.open_channel()
        while True:
            for frames in await channel.receive():
                try:
                    message = wire.decode(frames)
                except LightningBusError as exc:
                    self._fail_all(exc)  # it may have been the answer to any of them
                else:
                    self._on_message(message)

    def _on_message(self, message: wire.Message) -> None:
        body, request = message.body, message.header.request
        if isinstance(body, m.Task):
            if self.on_task is not None:
                self.on_task(body)
        elif isinstance(body, m.Error) and request == 0:
            self._fail_all(_error(body))
        elif request in self._pending:  # else the answer to something that was answered or given up before
            if isinstance(body, m.Error):
                self._pending[request].fail(_error(body))
            else:
                self._pending[request].set(message)

    def _fail_all(self, error: LightningBusError) -> None:
        for reply in list(self._pending.values()):
            reply.fail(error)


class Reply(Generic[V]):
    """An answer that is not here yet. The first of `set` and `fail` counts."""

    def __init__(self) -> None:
        self._event = anyio.Event()
        self._value: V | None = None
        self._error: LightningBusError | None = None

    def set(self, value: V) -> None:
        if not self._event.is_set():
            self._value = value
            self._event.set()

    def fail(self, error: LightningBusError) -> None:
        if not self._event.is_set():
            self._error = error
            self._event.set()

    async def wait(self) -> V:
        await self._event.wait()
        if self._error is not None:
            raise self._error
        return self._value  # pyright: ignore[reportReturnType] - set() was called


def _error(body: m.Error) -> LightningBusError:
    """Return the exception that the broker's refusal stands for."""
    kind = getattr(errors, body.code, None)
    if not (isinstance(kind, type) and issubclass(kind, LightningBusError)):
        return RemoteProtocolError(f"{body.code}: {body.message}")
    if kind is BusyError:
        return BusyError(body.message, body.retry_after_s)
    return kind(body.message)
