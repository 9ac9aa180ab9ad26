"""What agents, workers, gateway and trainer use to talk to a broker.

    async with Client("tcp://127.0.0.1:4750", role="trainer") as bus:
        await bus.submit([Submission("r-1", task)])
        ends = await bus.wait(["r-1"])
        async for record in bus.follow(offset=0):
            ...

Every request is sent again until it is answered or its limit is over, and every request is safe to send again; so a
broker that restarts is latency, not an error.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import anyio
import anyio.lowlevel
import msgspec

from lightning_bus import messages as m
from lightning_bus.client.holding import Leases
from lightning_bus.client.session import RESEND_S, Session
from lightning_bus.client.spool import Spool
from lightning_bus.client.waiting import Ends
from lightning_bus.errors import ClosedError, ConfigError, MessageTooLarge, RemoteProtocolError
from lightning_bus.keys import ClientKey, find_key
from lightning_bus.log.codec import decode_record
from lightning_bus.log.reader import LogReader
from lightning_bus.records import Record
from lightning_bus.resources import Resource
from lightning_bus.spans import Span, encode_spans

LIMIT_S = 60.0  # a broker that restarts and reopens its log is back well within this
FOLLOW_WAIT_S = 2.0  # of one FETCH; a follower notices a broker that restarted this much later at worst
FOLLOW_BYTES_MAX = 4 << 20
SUBMIT_BYTES = 4 << 20  # more rollouts at once go in several messages
IDS_MAX = 10_000  # so do more ids
PAGE = 500  # rollouts asked for at a time
TURN = 256  # records read locally before other tasks get theirs


class Submitted(NamedTuple):
    """What came of `submit`: how many were not known before, and the id of each rollout in the order given.

    An id is another than the one submitted where an idempotency key says that it is the same rollout.
    """

    fresh: int
    rollout_ids: list[str]


class Client:
    """A session with a broker. Use it inside `async with`; tasks of one event loop may share it.

    role   what this process is: worker, agent, gateway, trainer, admin; with a key, the key says
    key    file that `lightning-bus keys create` wrote; None: the one that LIGHTNING_BUS_KEY names, or no key
    token  an agent's own: it may append to the attempt that the token names, and to nothing else
    log    the run's log directory where it lies on this machine: `follow` then reads it there, past the broker
    """

    def __init__(
        self, address: str, *, role: str = "client", key: Path | None = None, token: str = "", log: Path | None = None,
        limit_s: float = LIMIT_S,
    ) -> None:  # fmt: skip
        self.address = address
        held = find_key() if key is None else ClientKey.load(key)
        self._session = Session(address, role if held is None else held.role, limit_s, token=token, key=held)
        self._spool = Spool(self._session)
        self._log = log
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

    async def submit(self, rollouts: Sequence[m.Submission]) -> Submitted:
        """Queue rollouts durably. Ids make submitting again a no-op, and so do idempotency keys.

        Any number may be given; many travel in several messages, each taken whole or not at all. Raises Conflict where
        an id or a key is known with another task, BusyError while too many are queued.
        """
        fresh, rollout_ids = 0, list[str]()
        for some in _portions(rollouts):
            accepted = await self._session.ask(m.Submit(some), m.Accepted)
            fresh += accepted.fresh
            rollout_ids += accepted.rollout_ids or [one.rollout_id for one in some]
        return Submitted(fresh, rollout_ids)

    async def wait(
        self, rollout_ids: Sequence[str], *, limit_s: float | None = None, on_end: Callable[[m.End], None] | None = None
    ) -> list[m.End]:
        """Return how these rollouts ended, in the order given, once all have. `on_end` hears of each as it happens.

        Raises as `ended` does.
        """
        ends: dict[str, m.End] = {}
        async with aclosing(self.ended(rollout_ids, limit_s=limit_s)) as stream:
            async for end in stream:
                ends[end.rollout_id] = end
                if on_end is not None:
                    on_end(end)
        return [ends[rollout_id] for rollout_id in rollout_ids]

    def ended(self, rollout_ids: Iterable[str], *, limit_s: float | None = None) -> AsyncGenerator[m.End]:
        """Yield the end of each of these rollouts as the broker tells it; those that have ended come at once.

        Thousands are fine: it is one subscription, renewed while some are open. Raises NotFound when the broker does
        not know one of them, BrokenError when it is silent, or when some had not ended after limit_s.
        """
        return Ends(self._session, rollout_ids, limit_s).stream()

    async def cancel(self, rollout_ids: Sequence[str]) -> int:
        """End rollouts that nobody wants any more; whoever works on one is told at its next heartbeat."""
        return sum([(await self._session.ask(m.Cancel(ids), m.Accepted)).fresh for ids in _pages(rollout_ids)])

    async def query(
        self, rollout_ids: Sequence[str] = (), limit: int = 1000, *, status: str = "", dead: bool = False,
        after: str = "",
    ) -> list[m.Rollout]:  # fmt: skip
        """Return where rollouts stand, in the order they were submitted; unknown ids are left out.

        status  only those that stand so: queued, leased, succeeded, failed, cancelled
        dead    only dead letters: failed, and neither replayed nor purged
        after   only those submitted after this one

        See `rollouts` for all of them.
        """
        query = m.Query(list(rollout_ids), limit, status, dead, after)
        return (await self._session.ask(query, m.Rollouts)).rollouts

    async def rollouts(self, *, status: str = "", dead: bool = False) -> AsyncGenerator[m.Rollout]:
        """Yield every rollout that `query` would return, however many, a page at a time."""
        after, page = "", PAGE
        while True:
            try:
                found = await self.query(limit=page, status=status, dead=dead, after=after)
            except MessageTooLarge:
                if page == 1:
                    raise
                page = max(1, page // 8)  # large tasks: fewer fit in one answer
                continue
            for rollout in found:
                yield rollout
            if len(found) < page:
                return
            after = found[-1].submission.rollout_id

    async def status(self) -> m.StatusIs:
        """Return the broker's counts."""
        return await self._session.ask(m.StatusQuery(), m.StatusIs)

    # -- operating

    def dead(self) -> AsyncGenerator[m.Rollout]:
        """Yield the dead letters: rollouts that failed for good and were neither replayed nor purged."""
        return self.rollouts(dead=True)

    async def replay(self, rollout_ids: Sequence[str]) -> list[str]:
        """Submit dead letters anew and return their new ids, in the order given. Again, it returns the same ids."""
        replayed: list[str] = []
        for ids in _pages(rollout_ids):
            replayed += (await self._session.ask(m.Replay(ids), m.Accepted)).rollout_ids
        return replayed

    async def purge(self, rollout_ids: Sequence[str]) -> int:
        """Take dead letters off the list for good, and return how many were on it. The log keeps their history."""
        return sum([(await self._session.ask(m.Purge(ids), m.Accepted)).fresh for ids in _pages(rollout_ids)])

    async def drain(self) -> None:
        """Have the broker lease nothing more until `resume`; what workers hold goes on."""
        await self._session.ask(m.Drain(), m.Accepted)

    async def resume(self) -> None:
        """Let the broker lease again."""
        await self._session.ask(m.Drain(resume=True), m.Accepted)

    # -- working

    @asynccontextmanager
    async def lease(self, slots: int, *, task_bytes_max: int = 0) -> AsyncGenerator[Leases]:
        """Ask for work: up to `slots` attempts at a time, kept by heartbeats while the context is open.

        task_bytes_max  what the tasks in hand may weigh together; a single larger one still comes, alone. 0: no limit
        """
        leases = Leases(self._session, slots, task_bytes_max)
        self._session.on_task = leases.take
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(leases.beat_for_ever)
                yield leases
                tasks.cancel_scope.cancel()
        finally:
            await leases.return_unbegun()
            self._session.on_task = None
            self._session.tell(m.Heartbeat(0))  # lost, the broker finds out after lease_s of silence

    # -- spans and the log

    async def append(self, rollout_id: str, attempt: int, spans: Sequence[Span]) -> None:
        """Make the spans durable; they are on disk when this returns.

        Calls that come while batches are on their way travel together in the next one. Batches are numbered, so that
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

    async def follow(self, offset: int = 0, *, wait_s: float = FOLLOW_WAIT_S) -> AsyncGenerator[Record]:
        """Yield every record from `offset` on, in the log's order, waiting for new ones for ever.

        With `log`, what is there is read on this machine and the broker only says when there is more: the same records
        in the same order, without its help. Raises ConfigError when that is not the log that the broker writes.
        """
        if self._log is None:
            async for record in self._fetched(offset, wait_s):
                yield record
            return
        with LogReader(self._log) as reader:
            await self._check_same_log(reader)
            while True:
                for number, record in enumerate(reader.records(offset), 1):
                    yield record
                    offset = record.offset + 1
                    if number % TURN == 0:
                        await anyio.lowlevel.checkpoint()
                records, offset, _ = await self.fetch(offset, bytes_max=FOLLOW_BYTES_MAX, wait_s=wait_s)
                for record in records:
                    yield record

    async def _check_same_log(self, reader: LogReader) -> None:
        """Refuse to read a log that is there and is another's: an older run's, or a copy that went its own way."""
        newest = next(reader.records(max(reader.first_offset, reader.end_offset - 1)), None)
        if newest is None:
            return
        records, _, _ = await self.fetch(newest.offset, bytes_max=1)
        if records[:1] != [newest]:
            raise ConfigError(
                f"{reader.path} is not the log that the broker at {self.address} writes: record {newest.offset} differs. "
                "Give its own log, or none to read over the bus."
            )

    async def _fetched(self, offset: int, wait_s: float) -> AsyncGenerator[Record]:
        while True:
            records, offset, _ = await self.fetch(offset, bytes_max=FOLLOW_BYTES_MAX, wait_s=wait_s)
            for record in records:
                yield record

    async def cursor(self, name: str, offset: int | None = None) -> int:
        """Move a named cursor forward to `offset` and return where it is; without offset, just ask."""
        return (await self._session.ask(m.Commit(name, offset), m.CursorAt)).offset

    # -- resources

    async def put(self, resource: Resource) -> None:
        """Publish one version of a named thing. Again with the same content is a no-op, with other content a Conflict."""
        await self._session.ask(m.Put(resource), m.Accepted)

    async def get(self, name: str, version: int | None = None) -> Resource | None:
        """Return a version of a named thing, the newest by default, or None."""
        return (await self._session.ask(m.Get(name, version), m.ResourceIs)).resource

    async def watch(self, name: str, above: int = -1, *, wait_s: float = FOLLOW_WAIT_S) -> AsyncGenerator[Resource]:
        """Yield versions of a named thing above `above` as they are published, for ever.

        Who is slow gets the newest and not each: the version is always higher than the one before.
        """
        while True:
            watch = m.Watch(name, above, int(wait_s * 1000))
            limit_s = self._session.limit_s + wait_s
            answer = await self._session.ask(watch, m.ResourceIs, resend_s=RESEND_S + wait_s, limit_s=limit_s)
            if answer.resource is not None and answer.resource.version > above:
                above = answer.resource.version
                yield answer.resource


def _portions(rollouts: Sequence[m.Submission]) -> Iterator[list[m.Submission]]:
    """Split rollouts into what one message carries well. None at all is one empty portion."""
    portion: list[m.Submission] = []
    size = 0
    for rollout in rollouts:
        size += len(_encode(rollout))
        if portion and (size > SUBMIT_BYTES or len(portion) >= IDS_MAX):
            yield portion
            portion, size = [], len(_encode(rollout))
        portion.append(rollout)
    yield portion


def _pages(rollout_ids: Sequence[str]) -> Iterator[list[str]]:
    for first in range(0, max(1, len(rollout_ids)), IDS_MAX):
        yield list(rollout_ids[first : first + IDS_MAX])


_encode = msgspec.msgpack.Encoder().encode
