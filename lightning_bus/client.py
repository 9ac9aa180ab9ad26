"""The client: what agents, workers, gateway and trainer use to talk to a broker.

    async with Client("tcp://127.0.0.1:4750", role="trainer") as bus:
        await bus.submit([Submission("r-1", task)])
        async for record in bus.follow(offset=0):
            ...

Every request is sent again until it is answered or its limit is over, and every request is safe to send again; so a
broker that restarts is latency, not an error. `BlockingClient` is the same for synchronous code.
"""

from __future__ import annotations

import secrets
from collections import OrderedDict, deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from types import TracebackType
from typing import Any, TypeVar, cast

import anyio
from anyio.from_thread import BlockingPortal, start_blocking_portal

from lightning_bus import errors, wire
from lightning_bus import messages as m
from lightning_bus.clock import monotonic_s
from lightning_bus.errors import (
    BrokenError,
    ClosedError,
    FencedError,
    LightningBusError,
    MessageTooLarge,
    RemoteProtocolError,
)
from lightning_bus.log.codec import decode_record
from lightning_bus.records import Record
from lightning_bus.resources import Resource
from lightning_bus.spans import Span, encode_spans
from lightning_bus.transport import Channel, connect_dealer

B = TypeVar("B", bound=m.Body)

LIMIT_S = 60.0  # a broker that restarts and reopens its log is back well within this
RESEND_S = 1.0  # an unanswered request is sent again after this
CONNECT_S = 0.02  # and one that found no connection after this
SPOOL_BYTES_MAX = 64 << 20  # spans waiting for the broker; above this `append` waits
BATCH_BYTES_MAX = 8 << 20
BEATS_PER_LEASE = 5
FOLLOW_WAIT_S = 2.0  # of one FETCH; a follower notices a broker that restarted this much later at worst
FINISHED_MAX = 10_000  # attempts remembered, so that a task sent twice is not run twice


class Client:
    """A session with a broker. Tasks of one event loop may share it."""

    def __init__(self, address: str, *, role: str = "client", limit_s: float = LIMIT_S) -> None:
        self.address = address
        self.session = f"{role}-{secrets.token_hex(6)}"
        self.limit_s = limit_s
        self._role = role
        self._channel: Channel | None = None
        self._pending: dict[int, _Reply] = {}
        self._request = 0
        self._epoch = 0
        self._seq = 0
        self._spool: deque[_Spooled] = deque()
        self._spool_bytes = 0
        self._spool_filled = anyio.Event()
        self._spool_drained = anyio.Event()
        self._batch: list[_Spooled] = []  # on its way
        self._on_task: Callable[[m.Task], None] | None = None
        self._tasks: Any = None
        self.welcome: m.Welcome | None = None

    async def __aenter__(self) -> Client:
        self._channel = connect_dealer(self.address, self.session)
        self._tasks = anyio.create_task_group()
        await self._tasks.__aenter__()
        self._tasks.start_soon(self._read)
        try:
            self.welcome = await self._ask(m.Hello(self._role, nonce=secrets.token_bytes(8)), m.Welcome)
        except BaseException as exc:
            await self.__aexit__(type(exc), exc, exc.__traceback__)
            raise
        self._epoch = self.welcome.epoch
        self._tasks.start_soon(self._flush_spool)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tasks.cancel_scope.cancel()
        try:
            await self._tasks.__aexit__(None, None, None)
        finally:
            self._channel = self._close_channel()
            self._fail_all(ClosedError(f"the client of {self.address} was closed while this call waited"))

    # -- rollouts

    async def submit(self, rollouts: Sequence[m.Submission]) -> int:
        """Queue rollouts durably and return how many were not known before. Ids make resending a no-op."""
        return (await self._ask(m.Submit(list(rollouts)), m.Accepted)).fresh

    async def cancel(self, rollout_ids: Sequence[str]) -> int:
        """End rollouts that nobody wants any more; whoever works on one is told at its next heartbeat."""
        return (await self._ask(m.Cancel(list(rollout_ids)), m.Accepted)).fresh

    async def query(self, rollout_ids: Sequence[str] = (), limit: int = 1000) -> list[m.Rollout]:
        """Return where rollouts stand; unknown ids are left out."""
        return (await self._ask(m.Query(list(rollout_ids), limit), m.Rollouts)).rollouts

    async def status(self) -> m.StatusIs:
        """Return the broker's counts."""
        return await self._ask(m.StatusQuery(), m.StatusIs)

    def lease(self, slots: int) -> AbstractAsyncContextManager[Leases]:
        """Ask for work: up to `slots` attempts at a time, kept by heartbeats while the context is open."""
        return self._lease(slots)

    # -- spans and the log

    async def append(self, rollout_id: str, attempt: int, spans: Sequence[Span]) -> None:
        """Make the spans durable; they are on disk when this returns.

        Calls that come while a batch is on its way travel together in the next one. The batch is numbered, so that
        a resend never appends twice. Raises FencedError when the attempt is over, BrokenError when the broker did
        not answer in time: the spans may or may not have been kept.
        """
        await self.append_blob(rollout_id, attempt, encode_spans(spans), len(spans))

    async def append_blob(self, rollout_id: str, attempt: int, blob: bytes, count: int) -> None:
        """Make an encoded chunk of `count` spans durable. See `append`."""
        self._check_blob(blob)
        self._open_channel()
        limit = anyio.current_time() + self.limit_s
        while self._spool_bytes > SPOOL_BYTES_MAX:
            with self._limited(limit, "APPEND"):
                await self._spool_drained.wait()
        spooled = _Spooled(m.Part(rollout_id, attempt, count), blob, _Reply())
        self._spool.append(spooled)
        self._spool_bytes += len(blob)
        self._spool_filled.set()
        with self._limited(limit, "APPEND"):
            await spooled.reply.wait()

    async def fetch(
        self, offset: int, *, bytes_max: int = 1 << 20, wait_s: float = 0.0
    ) -> tuple[list[Record], int, int]:
        """Return records from `offset` on, the offset to go on from, and the log's end.

        Waits up to wait_s for the first record; an empty list means that none came.
        """
        fetch = m.Fetch(offset, bytes_max, int(wait_s * 1000))
        reply = await self._exchange(fetch, (), resend_s=RESEND_S + wait_s, limit_s=self.limit_s + wait_s)
        chunk = _expect(reply.body, m.Chunk)
        return [decode_record(blob) for blob in reply.blobs], chunk.next_offset, chunk.end_offset

    async def follow(self, offset: int = 0, *, wait_s: float = FOLLOW_WAIT_S) -> AsyncIterator[Record]:
        """Yield every record from `offset` on, in the log's order, waiting for new ones for ever."""
        while True:
            records, offset, _ = await self.fetch(offset, bytes_max=4 << 20, wait_s=wait_s)
            for record in records:
                yield record

    async def cursor(self, name: str, offset: int | None = None) -> int:
        """Move a named cursor forward to `offset` and return where it is; without offset, just ask."""
        return (await self._ask(m.Cursor(name, offset), m.CursorAt)).offset

    # -- resources

    async def put(self, resource: Resource) -> None:
        """Publish one version of a named thing. Again with the same content is a no-op, with other content a Conflict."""
        await self._ask(m.Put(resource), m.Accepted)

    async def get(self, name: str, version: int | None = None) -> Resource | None:
        """Return a version of a named thing, the newest by default, or None."""
        return (await self._ask(m.Get(name, version), m.ResourceIs)).resource

    # -- how it is done

    async def _ask(self, body: m.Body, kind: type[B], blobs: Sequence[bytes] = (), count: int = 0) -> B:
        return _expect((await self._exchange(body, blobs, count=count)).body, kind)

    async def _exchange(
        self, body: m.Body, blobs: Sequence[bytes], *, seq: int = 0, count: int = 0, resend_s: float = RESEND_S,
        limit_s: float | None = None,
    ) -> wire.Message:  # fmt: skip
        """Send until answered. Raises what the broker answers with, or BrokenError when it does not within the limit."""
        limit_s = self.limit_s if limit_s is None else limit_s
        self._request += 1
        request = self._request
        frames = wire.encode(
            body, blobs, request=request, producer=self.session, epoch=self._epoch, seq=seq, count=count,
            deadline_ms=int(limit_s * 1000) if limit_s != float("inf") else 0,
        )  # fmt: skip
        reply = self._pending[request] = _Reply()
        until_s = monotonic_s() + limit_s
        try:
            while monotonic_s() < until_s:
                wait_s = resend_s if self._open_channel().send(frames) else CONNECT_S
                with anyio.move_on_after(min(wait_s, until_s - monotonic_s())):
                    return cast(wire.Message, await reply.wait())
        finally:
            del self._pending[request]
        raise BrokenError(
            f"the broker at {self.address} did not answer {wire.op_of(body).name} within {limit_s:g} s. "
            "Is it running? Start it with: lightning-bus broker"
        )

    async def _read(self) -> None:
        channel = self._open_channel()
        while True:
            for frames in await channel.receive():
                try:
                    message = wire.decode(frames)
                except LightningBusError as exc:
                    self._fail_all(exc)  # it may have been the answer to any of them
                else:
                    self._on_message(message)

    def _on_message(self, message: wire.Message) -> None:
        body = message.body
        if isinstance(body, m.Task):
            if self._on_task is not None:
                self._on_task(body)
            return
        if isinstance(body, m.Error):
            error = _error(body)
            if message.header.request == 0:
                self._fail_all(error)
            elif message.header.request in self._pending:
                self._pending[message.header.request].fail(error)
        elif message.header.request in self._pending:
            self._pending[message.header.request].set(message)

    async def _flush_spool(self) -> None:
        """Send what is spooled, one numbered batch at a time, until it is acknowledged, for as long as this client lives."""
        while True:
            while not self._spool:
                self._spool_filled = anyio.Event()
                await self._spool_filled.wait()
            self._batch = batch = self._take_batch()
            self._seq += 1
            append = m.Append([spooled.part for spooled in batch])
            count = sum(spooled.part.count for spooled in batch)
            try:
                reply = await self._exchange(
                    append, [spooled.blob for spooled in batch], seq=self._seq, count=count, limit_s=float("inf")
                )
                acked = _expect(reply.body, m.Acked)
            except LightningBusError as exc:
                for spooled in batch:
                    spooled.reply.fail(exc)
                await self._resume_numbers()
                continue
            fenced = set(acked.fenced)
            for index, spooled in enumerate(batch):
                if index in fenced:
                    part = spooled.part
                    spooled.reply.fail(
                        FencedError(
                            f"rollout {part.rollout_id} attempt {part.attempt} is over or was given to another worker. "
                            f"Its {part.count} span(s) were not kept."
                        )
                    )
                else:
                    spooled.reply.set(None)

    async def _resume_numbers(self) -> None:
        """After a batch that was refused, or whose fate is unknown: go on from the number that the broker has."""
        try:
            welcome = await self._ask(m.Hello(self._role, self._epoch), m.Welcome)
        except LightningBusError:
            return  # then the next batch is refused too, and asks again
        self._epoch, self._seq = welcome.epoch, welcome.seq_last

    def _take_batch(self) -> list[_Spooled]:
        batch: list[_Spooled] = []
        size = 0
        while (
            self._spool
            and len(batch) < wire.BLOBS_MAX
            and (not batch or size + len(self._spool[0].blob) <= BATCH_BYTES_MAX)
        ):
            spooled = self._spool.popleft()
            size += len(spooled.blob)
            batch.append(spooled)
        self._spool_bytes -= size
        self._spool_drained.set()
        self._spool_drained = anyio.Event()
        return batch

    @asynccontextmanager
    async def _lease(self, slots: int) -> AsyncGenerator[Leases]:
        assert self.welcome is not None
        leases = Leases(self, slots)
        self._on_task = leases.take
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(leases.beat_for_ever, self.welcome.lease_s / BEATS_PER_LEASE)
                yield leases
                tasks.cancel_scope.cancel()
        finally:
            self._on_task = None
            if self._channel is not None:
                # Said once and not waited for: when it is lost, the broker finds out after lease_s of silence.
                self._channel.send(wire.encode(m.Heartbeat(0), producer=self.session, epoch=self._epoch))

    @contextmanager
    def _limited(self, until: float, what: str) -> Generator[None]:
        with anyio.move_on_at(until) as scope:
            yield
        if scope.cancelled_caught:
            raise BrokenError(
                f"the broker at {self.address} did not answer {what} within {self.limit_s:g} s. "
                "Is it running, and is its disk keeping up?"
            )

    def _check_blob(self, blob: bytes) -> None:
        if len(blob) > m.BLOB_BYTES_MAX:
            raise MessageTooLarge(
                f"a chunk of {len(blob)} bytes exceeds the limit of {m.BLOB_BYTES_MAX}. "
                "Append fewer spans at a time, or keep large objects in a file and record the path."
            )

    def _open_channel(self) -> Channel:
        if self._channel is None:
            raise ClosedError(f"the client of {self.address} is closed; use it inside `async with`")
        return self._channel

    def _close_channel(self) -> None:
        if self._channel is not None:
            self._channel.close()

    def _fail_all(self, error: LightningBusError) -> None:
        for reply in list(self._pending.values()):
            reply.fail(error)
        if isinstance(error, ClosedError):
            for spooled in (*self._batch, *self._spool):
                spooled.reply.fail(error)


class Leases:
    """The attempts this process holds. Iterate for new tasks; end each with `done` or `fail`."""

    def __init__(self, client: Client, slots: int) -> None:
        self._client = client
        self._slots = slots
        self._held: dict[tuple[str, int], m.Task] = {}
        self._finished: OrderedDict[tuple[str, int], None] = OrderedDict()
        self._lost_callbacks: dict[tuple[str, int], Callable[[], None]] = {}
        self._arrived: deque[m.Task] = deque()
        self._changed = anyio.Event()
        self._stopped = anyio.Event()

    def __aiter__(self) -> Leases:
        return self

    async def __anext__(self) -> m.Task:
        while True:
            while self._arrived:
                task = self._arrived.popleft()
                if (task.rollout_id, task.attempt) in self._held:  # else it was lost while it waited here
                    return task
            if self._stopped.is_set():
                raise StopAsyncIteration
            self._changed = anyio.Event()
            await self._changed.wait()

    @property
    def held(self) -> int:
        """Attempts in hand."""
        return len(self._held)

    async def done(self, task: m.Task, reward: float | None, spans: Sequence[Span] = ()) -> None:
        """Report the agent's result. The last spans commit in the same transaction as the new status.

        Raises FencedError when the attempt was given to another worker: the result was not recorded.
        """
        await self._finish(task, m.Done(task.rollout_id, task.attempt, reward), spans)

    async def fail(self, task: m.Task, error: str, *, retryable: bool = True, spans: Sequence[Span] = ()) -> None:
        """Report that the agent did not return. It is tried again while attempts remain, unless not retryable."""
        await self._finish(task, m.Fail(task.rollout_id, task.attempt, error, retryable), spans)

    def on_lost(self, task: m.Task, callback: Callable[[], None]) -> None:
        """Call back, once, when the broker says that this attempt is no longer ours; at once if it said so already."""
        key = task.rollout_id, task.attempt
        if key in self._held:
            self._lost_callbacks[key] = callback
        else:
            callback()

    def stop(self) -> None:
        """Take no more tasks. The iterator ends; attempts in hand stay ours until they are reported."""
        self._slots = 0
        self._stopped.set()
        self._changed.set()

    def take(self, task: m.Task) -> None:
        """A task arrived. One that is in hand or was finished is the broker repeating itself, and is ignored.

        So is one that crossed our `stop` on the way: held, it would be kept by heartbeats and run by nobody.
        """
        key = task.rollout_id, task.attempt
        if self._stopped.is_set() or key in self._held or key in self._finished:
            return
        self._held[key] = task
        self._arrived.append(task)
        self._changed.set()

    async def beat_for_ever(self, interval_s: float) -> None:
        while True:
            slots = self._slots
            held = [m.Held(*key) for key in self._held]
            try:
                reply = await self._client._exchange(m.Heartbeat(slots, held), (), resend_s=interval_s)  # pyright: ignore[reportPrivateUsage]
            except BrokenError:
                continue  # the broker is away; whether our leases live on is its to say when it is back
            for lost in _expect(reply.body, m.Beat).lost:
                self._held.pop((lost.rollout_id, lost.attempt), None)
                callback = self._lost_callbacks.pop((lost.rollout_id, lost.attempt), None)
                if callback is not None:
                    callback()
            with anyio.move_on_after(interval_s):
                # That we stopped the broker should know at once, or it goes on sending.
                await (self._stopped.wait() if slots else anyio.sleep_forever())

    async def _finish(self, task: m.Task, body: m.Body, spans: Sequence[Span]) -> None:
        key = task.rollout_id, task.attempt
        blobs = [encode_spans(spans)] if spans else []
        for blob in blobs:
            self._client._check_blob(blob)  # pyright: ignore[reportPrivateUsage]
        try:
            await self._client._ask(body, m.Accepted, blobs, count=len(spans))  # pyright: ignore[reportPrivateUsage]
        finally:
            self._held.pop(key, None)
            self._lost_callbacks.pop(key, None)
            self._finished[key] = None
            if len(self._finished) > FINISHED_MAX:
                self._finished.popitem(last=False)


class BlockingClient:
    """`Client` for synchronous code: the same methods, run in an event loop of their own."""

    def __init__(self, address: str, *, role: str = "client", limit_s: float = LIMIT_S) -> None:
        self._client = Client(address, role=role, limit_s=limit_s)
        self._portal: BlockingPortal | None = None

    def __enter__(self) -> BlockingClient:
        self._portal_context = start_blocking_portal()
        self._portal = self._portal_context.__enter__()
        self._client_context = self._portal.wrap_async_context_manager(self._client)
        try:
            self._client_context.__enter__()
        except BaseException:
            self._portal_context.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client_context.__exit__(None, None, None)
        self._portal_context.__exit__(None, None, None)
        self._portal = None

    @property
    def session(self) -> str:
        return self._client.session

    def submit(self, rollouts: Sequence[m.Submission]) -> int:
        return self._call(self._client.submit, rollouts)

    def cancel(self, rollout_ids: Sequence[str]) -> int:
        return self._call(self._client.cancel, rollout_ids)

    def query(self, rollout_ids: Sequence[str] = (), limit: int = 1000) -> list[m.Rollout]:
        return self._call(self._client.query, rollout_ids, limit)

    def status(self) -> m.StatusIs:
        return self._call(self._client.status)

    def append(self, rollout_id: str, attempt: int, spans: Sequence[Span]) -> None:
        self._call(self._client.append, rollout_id, attempt, spans)

    def fetch(self, offset: int, *, bytes_max: int = 1 << 20, wait_s: float = 0.0) -> tuple[list[Record], int, int]:
        async def call() -> tuple[list[Record], int, int]:
            return await self._client.fetch(offset, bytes_max=bytes_max, wait_s=wait_s)

        return self._call(call)

    def follow(self, offset: int = 0, *, wait_s: float = FOLLOW_WAIT_S) -> Iterator[Record]:
        while True:
            records, offset, _ = self.fetch(offset, bytes_max=4 << 20, wait_s=wait_s)
            yield from records

    def cursor(self, name: str, offset: int | None = None) -> int:
        return self._call(self._client.cursor, name, offset)

    def put(self, resource: Resource) -> None:
        self._call(self._client.put, resource)

    def get(self, name: str, version: int | None = None) -> Resource | None:
        return self._call(self._client.get, name, version)

    def _call(self, method: Callable[..., Any], *args: Any) -> Any:
        if self._portal is None:
            raise ClosedError(f"the client of {self._client.address} is closed; use it inside `with`")
        return self._portal.call(method, *args)


class _Reply:
    """An answer that is not here yet."""

    def __init__(self) -> None:
        self._event = anyio.Event()
        self._value: Any = None
        self._error: LightningBusError | None = None

    def set(self, value: Any) -> None:
        self._value = value
        self._event.set()

    def fail(self, error: LightningBusError) -> None:
        if not self._event.is_set():
            self._error = error
            self._event.set()

    async def wait(self) -> Any:
        await self._event.wait()
        if self._error is not None:
            raise self._error
        return self._value


class _Spooled:
    """Spans waiting for their batch, and who waits for them."""

    __slots__ = ("blob", "part", "reply")

    def __init__(self, part: m.Part, blob: bytes, reply: _Reply) -> None:
        self.part = part
        self.blob = blob
        self.reply = reply


def _expect(body: m.Body, kind: type[B]) -> B:
    if not isinstance(body, kind):
        raise RemoteProtocolError(f"the broker answered with {type(body).__name__} where {kind.__name__} was due")
    return body


def _error(body: m.Error) -> LightningBusError:
    """Return the exception that the broker's refusal stands for."""
    kind = getattr(errors, body.code, None)
    if not (isinstance(kind, type) and issubclass(kind, LightningBusError)):
        return RemoteProtocolError(f"{body.code}: {body.message}")
    if kind is errors.BusyError:
        return errors.BusyError(body.message, body.retry_after_s)
    return kind(body.message)
