"""One conversation with a broker: ask, send again until answered, give up at the limit.

Every request is safe to send again, so silence has one cure. Answers find their request by its number; what comes
unasked (tasks) goes to whoever registered for it. What is said in one turn of the event loop leaves as one message,
in the order it was said; resends do too.

A worker makes thousands of requests a second on a core that it shares with agents. So one timer watches over all
that are unanswered, and waiting for an answer is a bare future of the loop, without a scope or a timer of its own.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Generic, TypeVar

import anyio

from lightning_bus import errors, wire
from lightning_bus import messages as m
from lightning_bus.errors import (
    AccessDenied,
    BrokenError,
    BusyError,
    ClosedError,
    LightningBusError,
    RemoteProtocolError,
)
from lightning_bus.transport import ConnectKey, Dealer, connect_dealer, producer_name

B = TypeVar("B", bound=m.Body)
V = TypeVar("V")

RESEND_S = 1.0  # an unanswered request is sent again after this
CONNECT_S = 0.02  # and one that found no connection after this
EARLY_S = 0.001  # what is due this soon is sent with what is due now


class Session:
    """A named producer's connection. Open it as a context manager; tasks of one event loop share it."""

    def __init__(
        self, address: str, role: str, limit_s: float, *, token: str = "", key: ConnectKey | None = None
    ) -> None:
        self.address = address
        self.producer = f"{role}-{secrets.token_hex(6)}" if key is None else producer_name(role, key)
        self.limit_s = limit_s
        self.on_task: Callable[[m.Task], None] | None = None
        self._role = role
        self._key = key
        self._token = token
        self._nonce = b""
        self._channel: Dealer | None = None
        # Not from 1: what a former bearer of our name is still answered must not match anything of ours.
        self._request = int.from_bytes(secrets.token_bytes(4), "big")
        self._welcome: m.Welcome | None = None
        self._tasks: Any = None
        self._pending: dict[int, _Pending] = {}
        self._outbox: list[_Pending | wire.Packed] = []
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at_s = float("inf")

    async def __aenter__(self) -> Session:
        self._channel = connect_dealer(self.address, self.producer, self._key)
        self._tasks = anyio.create_task_group()
        await self._tasks.__aenter__()
        self._tasks.start_soon(self._read)
        try:
            self._welcome = await self._greet(0)
        except BaseException as exc:
            await self.__aexit__(type(exc), exc, exc.__traceback__)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._flush()
        self._tasks.cancel_scope.cancel()
        try:
            await self._tasks.__aexit__(None, None, None)
        finally:
            if self._timer is not None:
                self._timer.cancel()
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
        self._welcome = await self._greet(self.welcome.epoch)
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
        """Send until answered. Raises what the broker answers with, or BrokenError when it does not within the limit.

        A broker that is busy is asked again when it said to come back; BusyError when that is beyond the limit.
        """
        loop = asyncio.get_running_loop()
        limit_s = self.limit_s if limit_s is None else limit_s
        until_s = loop.time() + limit_s
        while True:
            reply: Reply[wire.Message] = Reply()  # Reply[…]() takes six times as long
            packed = self._pack(body, blobs, seq, count)
            pending = _Pending(packed, reply.set, reply.fail, self._epoch, resend_s, limit_s, until_s)
            self._begin(pending)
            try:
                return await reply.wait()
            except BusyError as exc:
                if loop.time() + exc.retry_after_s >= until_s:
                    raise
                retry_after_s = exc.retry_after_s
            finally:
                del self._pending[pending.request]
            await anyio.sleep(retry_after_s)

    @contextmanager
    def subscribe(
        self,
        body: m.Body,
        on_message: Callable[[wire.Message], None],
        on_error: Callable[[LightningBusError], None] | None = None,
        *,
        resend_s: float = RESEND_S,
    ) -> Generator[None]:
        """Ask something that is answered many times; `on_message` is called for each answer while the context is open.

        The request is sent again until its first answer, and not after that. `on_error` hears a refusal, and that the
        client was closed.
        """
        pending = _Pending(self._pack(body), on_message, on_error or _ignore, self._epoch, resend_s)
        self._begin(pending)
        try:
            yield
        finally:
            del self._pending[pending.request]

    def tell(self, body: m.Body) -> None:
        """Send once and wait for nothing; for what the broker finds out by itself when it is lost."""
        if self._channel is not None:
            self._put_out(wire.pack(body))

    def open_channel(self) -> Dealer:
        """Return the connection. Raises ClosedError outside the context."""
        if self._channel is None:
            raise ClosedError(f"the client of {self.address} is closed; use it inside `async with`")
        return self._channel

    async def _greet(self, epoch: int) -> m.Welcome:
        # Kept until it is answered: under another nonce the broker would take our own new epoch for a successor's.
        self._nonce = self._nonce or secrets.token_bytes(8)
        welcome = await self.ask(m.Hello(self._role, epoch, self._nonce, self._token), m.Welcome)
        self._nonce = b""
        return welcome

    # -- sending

    def _pack(self, body: m.Body, blobs: Sequence[bytes] = (), seq: int = 0, count: int = 0) -> wire.Packed:
        self.open_channel()
        self._request += 1
        return wire.pack(body, blobs, request=self._request, seq=seq, count=count)

    def _begin(self, pending: _Pending) -> None:
        self._pending[pending.request] = pending
        self._put_out(pending)

    @property
    def _epoch(self) -> int:
        return 0 if self._welcome is None else self._welcome.epoch

    def _put_out(self, outgoing: _Pending | wire.Packed) -> None:
        if not self._outbox:
            asyncio.get_running_loop().call_soon(self._flush)  # after all that is ready to run in this turn
        self._outbox.append(outgoing)

    def _flush(self) -> None:
        """Send what was said in this turn."""
        outbox, self._outbox = self._outbox, []
        if self._channel is None or not outbox:
            return
        now_s = asyncio.get_running_loop().time()
        due_s = float("inf")
        try:
            for outgoing, taken in self._hand_over(outbox):
                if isinstance(outgoing, _Pending):
                    outgoing.due_s = min(now_s + (outgoing.resend_s if taken else CONNECT_S), outgoing.until_s)
                    due_s = min(due_s, outgoing.due_s)
        except LightningBusError as exc:
            self._fail_all(exc)  # this client is refused for good
        self._wake_at(due_s)

    def _hand_over(self, outbox: list[_Pending | wire.Packed]) -> Generator[tuple[_Pending | wire.Packed, bool]]:
        """Give the messages to ZeroMQ, in as few as they fit in; yield each with whether it was taken.

        A request keeps the epoch it was made in, however often it is sent: what is numbered in one must never turn up
        under another.
        """
        channel = self.open_channel()
        at = 0
        while at < len(outbox):
            epoch = self._epoch_of(outbox[at])
            end = at + 1
            while end < len(outbox) and self._epoch_of(outbox[end]) == epoch:
                end += 1
            same = outbox[at:end]
            taken = True
            for frames in wire.join((_packed(outgoing) for outgoing in same), producer=self.producer, epoch=epoch):
                try:
                    taken = channel.send(frames) and taken
                except AccessDenied as exc:  # there is no connection, and waiting will not bring one
                    taken = False
                    self._fail_all(exc)
            for outgoing in same:
                yield outgoing, taken
            at = end

    def _epoch_of(self, outgoing: _Pending | wire.Packed) -> int:
        return outgoing.epoch if isinstance(outgoing, _Pending) else self._epoch

    def _wake_at(self, due_s: float) -> None:
        if due_s < self._timer_at_s:
            if self._timer is not None:
                self._timer.cancel()
            self._timer_at_s = due_s
            self._timer = asyncio.get_running_loop().call_at(due_s, self._on_timer)

    def _on_timer(self) -> None:
        """Send again what is due, give up what is over its limit, and look again when the next is due."""
        self._timer, self._timer_at_s = None, float("inf")
        now_s = asyncio.get_running_loop().time()
        next_s = float("inf")
        for pending in list(self._pending.values()):
            if pending.until_s <= now_s:
                pending.due_s = float("inf")
                pending.on_error(self._no_answer(pending))
            elif pending.due_s <= now_s + EARLY_S:
                pending.due_s = float("inf")  # until it has left
                self._put_out(pending)
            else:
                next_s = min(next_s, pending.due_s)
        self._wake_at(next_s)

    def _no_answer(self, pending: _Pending) -> BrokenError:
        return BrokenError(
            f"the broker at {self.address} did not answer {pending.packed.op.name} within "
            f"{pending.limit_s:g} s. Is it running? Start it with: lightning-bus broker"
        )

    # -- receiving

    async def _read(self) -> None:
        channel = self.open_channel()
        while True:
            for frames in await channel.receive():
                try:
                    messages = wire.split(wire.decode(frames))
                except LightningBusError as exc:
                    self._fail_all(exc)  # it may have been the answer to any of them
                else:
                    for message in messages:
                        self._on_message(message)

    def _on_message(self, message: wire.Message | wire.Unreadable) -> None:
        if isinstance(message, wire.Unreadable):
            pending = self._pending.get(message.request)
            if pending is not None:
                pending.on_error(message.error)
            return
        body, request = message.body, message.header.request
        pending = self._pending.get(request)
        if isinstance(body, m.Task):
            if self.on_task is not None:
                self.on_task(body)
        elif isinstance(body, m.Error) and request == 0:
            self._fail_all(_error(body))
        elif pending is not None:  # else the answer to something that was answered or given up before
            pending.due_s = float("inf")
            if isinstance(body, m.Error):
                pending.on_error(_error(body))
            else:
                pending.on_message(message)

    def _fail_all(self, error: LightningBusError) -> None:
        for pending in list(self._pending.values()):
            pending.on_error(error)


class Reply(Generic[V]):
    """An answer that is not here yet. The first of `set` and `fail` counts."""

    __slots__ = ("_error", "_future")

    def __init__(self) -> None:
        self._future: asyncio.Future[V] = asyncio.get_running_loop().create_future()
        self._error: LightningBusError | None = None

    def set(self, value: V) -> None:
        if not self._future.done():
            self._future.set_result(value)

    def fail(self, error: LightningBusError) -> None:
        if not self._future.done():
            self._error = error
            self._future.set_result(None)  # pyright: ignore[reportArgumentType] - wait() looks at the error first

    async def wait(self) -> V:
        """Return the answer or raise the error; whoever waits is the only one. Cancelled, nobody waits any more."""
        value = await self._future
        if self._error is not None:
            raise self._error
        return value


class _Pending:
    """A request that is not answered yet."""

    __slots__ = ("due_s", "epoch", "limit_s", "on_error", "on_message", "packed", "resend_s", "until_s")

    def __init__(
        self, packed: wire.Packed, on_message: Callable[[wire.Message], None],
        on_error: Callable[[LightningBusError], None], epoch: int, resend_s: float,
        limit_s: float = float("inf"), until_s: float = float("inf"),
    ) -> None:  # fmt: skip
        self.packed = packed
        self.on_message = on_message
        self.on_error = on_error
        self.epoch = epoch
        self.resend_s = resend_s
        self.limit_s = limit_s
        self.until_s = until_s
        self.due_s = float("inf")  # when to send it again; it has not left yet, or was answered

    @property
    def request(self) -> int:
        return self.packed.request


def _packed(outgoing: _Pending | wire.Packed) -> wire.Packed:
    return outgoing.packed if isinstance(outgoing, _Pending) else outgoing


def _ignore(error: LightningBusError) -> None:
    pass


def _error(body: m.Error) -> LightningBusError:
    """Return the exception that the broker's refusal stands for."""
    kind = getattr(errors, body.code, None)
    if not (isinstance(kind, type) and issubclass(kind, LightningBusError)):
        return RemoteProtocolError(f"{body.code}: {body.message}")
    if kind is BusyError:
        return BusyError(body.message, body.retry_after_s)
    return kind(body.message)
