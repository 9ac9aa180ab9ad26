"""The broker process: receive, decide, commit a group, then reply.

One event loop owns the ROUTER and the state and takes every decision (`core`); one thread owns the log and makes
decisions durable. Between them is a queue, and group commit is natural: while one fsync runs, decisions pile up, and
the next transaction takes them all. Replies leave only after the commit they depend on, in the order they were
decided, so an acknowledgement always means fsync'd.
"""

from __future__ import annotations

import queue
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import anyio
import anyio.from_thread
import anyio.to_thread

from lightning_bus import messages as m
from lightning_bus import wire
from lightning_bus.broker import core
from lightning_bus.clock import monotonic_s, wall_ns
from lightning_bus.config import BrokerSection
from lightning_bus.errors import LightningBusError, MessageTooLarge
from lightning_bus.log.store import LogWriter
from lightning_bus.records import Record
from lightning_bus.transport import Channel, bind_router

GROUP_BYTES_MAX = 8 << 20  # one transaction: long enough to amortise the fsync, short enough to bound the latency
QUEUE_BYTES_MAX = 64 << 20  # decided but not yet durable; above this the broker stops reading and TCP pushes back
TICK_S = 0.1
WAIT_MS_MAX = 30_000  # longest a FETCH is held open


async def serve_broker(
    section: BrokerSection, log_dir: Path, secret: bytes, *, started: Callable[[str], None] | None = None
) -> None:
    """Run the broker until cancelled; what it has decided by then is durable when this returns.

    `started` is called with the bound address. Raises StorageError when the disk refuses data.
    """
    log = LogWriter(log_dir, map_bytes_max=section.map_bytes_max)
    try:
        channel, address = bind_router(section.bind)
        with channel:
            state = core.restore(
                log.load(),
                secret=secret,
                lease_s=section.lease_s,
                max_attempts=section.max_attempts,
                now_s=monotonic_s(),
            )
            server = BrokerServer(state, log, channel)
            if started is not None:
                started(address)
            await server.run()
    finally:
        log.close()


@dataclass(slots=True)
class Waiter:
    """A FETCH that asked to wait for records that do not exist yet."""

    peer: str
    request: int
    fetch: m.Fetch
    until_s: float


class BrokerServer:
    """The loop, the committer and the queue between them."""

    def __init__(self, state: core.BrokerState, log: LogWriter, channel: Channel) -> None:
        self._state = state
        self._log = log
        self._channel = channel
        self._queue: queue.SimpleQueue[tuple[core.Effects, int] | None] = queue.SimpleQueue()
        self._queued_bytes = 0
        self._room = anyio.Event()
        self._waiters: list[Waiter] = []
        self._durable_offset = state.next_offset

    async def run(self) -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._commit_in_thread)
            try:
                async with anyio.create_task_group() as loops:
                    loops.start_soon(self._receive)
                    loops.start_soon(self._tick)
            finally:
                self._queue.put(None)  # the committer drains what was decided, then ends

    async def _receive(self) -> None:
        while True:
            for frames in await self._channel.receive():
                self._on_frames(frames)
            while self._queued_bytes > QUEUE_BYTES_MAX:
                self._room = anyio.Event()
                await self._room.wait()

    async def _tick(self) -> None:
        while True:
            await anyio.sleep(TICK_S)
            now_s = monotonic_s()
            self._decide(core.tick(self._state, now_s, wall_ns()), 0)
            self._serve_waiters(now_s)

    def _on_frames(self, frames: list[bytes]) -> None:
        peer = frames[0].decode("utf-8", "replace")
        try:
            message = wire.decode(frames[1:])
        except LightningBusError as exc:
            # The request number may be unreadable too; clients take an ERROR for request 0 as one for all of them.
            self._send(frames[0], core.Send(peer, 0, m.Error(type(exc).__name__, str(exc))))
            return
        if isinstance(message.body, m.Fetch):
            wait_s = min(message.body.wait_ms, WAIT_MS_MAX) / 1000
            self._waiters.append(Waiter(peer, message.header.request, message.body, monotonic_s() + wait_s))
            if message.body.offset < self._durable_offset or wait_s == 0:
                self._serve_waiters(monotonic_s())
            return
        effects = core.handle(self._state, peer, *message, now_s=monotonic_s(), wall_ns=wall_ns())
        self._decide(effects, sum(map(len, frames)))

    def _decide(self, effects: core.Effects, size: int) -> None:
        if effects.writes or effects.sends:
            self._queued_bytes += size
            self._queue.put((effects, size))

    async def _commit_in_thread(self) -> None:
        await anyio.to_thread.run_sync(self._commit_groups)

    def _commit_groups(self) -> None:
        """The committer thread: take what is queued, one transaction, fsync, then hand the replies back."""
        ending = False
        while not ending:
            group: list[core.Effects] = []
            size = 0
            block = True
            while size < GROUP_BYTES_MAX:
                try:
                    item = self._queue.get(block=block)
                except queue.Empty:
                    break
                if item is None:
                    ending = True
                    break
                group.append(item[0])
                size += item[1]
                block = False
            writes = [write for effects in group for write in effects.writes]
            if writes:
                self._log.commit(writes)
            sends = [send for effects in group for send in effects.sends]
            offset = max((write.offset + 1 for write in writes if isinstance(write, Record)), default=0)
            anyio.from_thread.run_sync(partial(self._on_durable, sends, offset, size))

    def _on_durable(self, sends: list[core.Send], offset: int, size: int) -> None:
        # Commit, then reply. A worker that holds an ack may forget the span, so from that moment the log owns the
        # only copy.
        for send in sends:
            self._send(send.peer.encode(), send)
        self._queued_bytes -= size
        if self._queued_bytes <= QUEUE_BYTES_MAX:
            self._room.set()
        if offset > self._durable_offset:
            self._durable_offset = offset
            self._serve_waiters(monotonic_s())

    def _serve_waiters(self, now_s: float) -> None:
        waiting, self._waiters = self._waiters, []
        for waiter in waiting:
            if waiter.fetch.offset < self._durable_offset or waiter.until_s <= now_s:
                bytes_max = min(waiter.fetch.bytes_max, m.MESSAGE_BYTES_MAX // 2)
                values, end_offset = self._log.read(waiter.fetch.offset, bytes_max)
                chunk = m.Chunk(waiter.fetch.offset + len(values), end_offset)
                self._send(waiter.peer.encode(), core.Send(waiter.peer, waiter.request, chunk), values)
            else:
                self._waiters.append(waiter)

    def _send(self, identity: bytes, send: core.Send, blobs: list[bytes] | None = None) -> None:
        """Send, or drop: a reply that cannot be delivered is asked for again, a task that is lost is sent again."""
        try:
            frames = wire.encode(send.body, blobs or (), request=send.request)
        except MessageTooLarge as exc:
            frames = wire.encode(
                m.Error("MessageTooLarge", f"the answer is too large; ask for less at a time. {exc}"),
                request=send.request,
            )
        self._channel.send([identity, *frames])
