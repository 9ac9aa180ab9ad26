"""What agents, workers, gateway and trainer use to talk to a broker.

    async with Client("tcp://127.0.0.1:4750", role="trainer") as bus:
        await bus.submit([Submission("r-1", task)])
        async for record in bus.follow(offset=0):
            ...

Every request is sent again until it is answered or its limit is over, and every request is safe to send again; so a
broker that restarts is latency, not an error.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from types import TracebackType

import anyio

from lightning_bus import messages as m
from lightning_bus.client.holding import BEATS_PER_LEASE, Leases
from lightning_bus.client.session import RESEND_S, Session
from lightning_bus.client.spool import Spool
from lightning_bus.errors import ClosedError, RemoteProtocolError
from lightning_bus.log.codec import decode_record
from lightning_bus.records import Record
from lightning_bus.resources import Resource
from lightning_bus.spans import Span, encode_spans

LIMIT_S = 60.0  # a broker that restarts and reopens its log is back well within this
FOLLOW_WAIT_S = 2.0  # of one FETCH; a follower notices a broker that restarted this much later at worst
FOLLOW_BYTES_MAX = 4 << 20


class Client:
    """A session with a broker. Use it inside `async with`; tasks of one event loop may share it."""

    def __init__(self, address: str, *, role: str = "client", limit_s: float = LIMIT_S) -> None:
        self.address = address
        self._session = Session(address, role, limit_s)
        self._spool = Spool(self._session)
        self._exit = AsyncExitStack()

    async def __aenter__(self) -> Client:
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self._session)
            stack.callback(
                self._spool.close, ClosedError(f"the client of {self.address} was closed while this call waited")
            )
            tasks = await stack.enter_async_context(anyio.create_task_group())
            stack.callback(tasks.cancel_scope.cancel)
            tasks.start_soon(self._spool.flush_for_ever)
            self._exit = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._exit.__aexit__(None, None, None)

    @property
    def session(self) -> str:
        """The name this client appends and leases under."""
        return self._session.producer

    # -- rollouts

    async def submit(self, rollouts: Sequence[m.Submission]) -> int:
        """Queue rollouts durably and return how many were not known before. Ids make resending a no-op."""
        return (await self._session.ask(m.Submit(list(rollouts)), m.Accepted)).fresh

    async def cancel(self, rollout_ids: Sequence[str]) -> int:
        """End rollouts that nobody wants any more; whoever works on one is told at its next heartbeat."""
        return (await self._session.ask(m.Cancel(list(rollout_ids)), m.Accepted)).fresh

    async def query(self, rollout_ids: Sequence[str] = (), limit: int = 1000) -> list[m.Rollout]:
        """Return where rollouts stand; unknown ids are left out."""
        return (await self._session.ask(m.Query(list(rollout_ids), limit), m.Rollouts)).rollouts

    async def status(self) -> m.StatusIs:
        """Return the broker's counts."""
        return await self._session.ask(m.StatusQuery(), m.StatusIs)

    @asynccontextmanager
    async def lease(self, slots: int) -> AsyncGenerator[Leases]:
        """Ask for work: up to `slots` attempts at a time, kept by heartbeats while the context is open."""
        leases = Leases(self._session, slots)
        self._session.on_task = leases.take
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(leases.beat_for_ever, self._session.welcome.lease_s / BEATS_PER_LEASE)
                yield leases
                tasks.cancel_scope.cancel()
        finally:
            self._session.on_task = None
            self._session.tell(m.Heartbeat(0))  # lost, the broker finds out after lease_s of silence

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
        await self._spool.append(m.Part(rollout_id, attempt, count), blob)

    async def fetch(
        self, offset: int, *, bytes_max: int = 1 << 20, wait_s: float = 0.0
    ) -> tuple[list[Record], int, int]:
        """Return records from `offset` on, the offset to go on from, and the log's end.

        Waits up to wait_s for the first record; an empty list means that none came.
        """
        fetch = m.Fetch(offset, bytes_max, int(wait_s * 1000))
        reply = await self._session.exchange(fetch, resend_s=RESEND_S + wait_s, limit_s=self._session.limit_s + wait_s)
        if not isinstance(reply.body, m.Chunk):
            raise RemoteProtocolError(f"the broker answered FETCH with {type(reply.body).__name__}")
        return [decode_record(blob) for blob in reply.blobs], reply.body.next_offset, reply.body.end_offset

    async def follow(self, offset: int = 0, *, wait_s: float = FOLLOW_WAIT_S) -> AsyncIterator[Record]:
        """Yield every record from `offset` on, in the log's order, waiting for new ones for ever."""
        while True:
            records, offset, _ = await self.fetch(offset, bytes_max=FOLLOW_BYTES_MAX, wait_s=wait_s)
            for record in records:
                yield record

    async def cursor(self, name: str, offset: int | None = None) -> int:
        """Move a named cursor forward to `offset` and return where it is; without offset, just ask."""
        return (await self._session.ask(m.Cursor(name, offset), m.CursorAt)).offset

    # -- resources

    async def put(self, resource: Resource) -> None:
        """Publish one version of a named thing. Again with the same content is a no-op, with other content a Conflict."""
        await self._session.ask(m.Put(resource), m.Accepted)

    async def get(self, name: str, version: int | None = None) -> Resource | None:
        """Return a version of a named thing, the newest by default, or None."""
        return (await self._session.ask(m.Get(name, version), m.ResourceIs)).resource
