"""The broker process: receive, decide, commit a group, then reply.

One event loop owns the ROUTER and the state and takes every decision (`core`); one thread owns the log and makes
decisions durable. Between them is a queue, and group commit is natural: while one fsync runs, decisions pile up, and
the next transaction takes them all. Replies leave only after the commit they depend on, in the order they were
decided, so an acknowledgement always means fsync'd.

Told to stop, a broker first lets workers end what they hold, for drain_s at most: it leases nothing more and takes no
new rollouts, but whatever is reported is committed and answered.
"""

from __future__ import annotations

import asyncio
import gc
import queue
from collections.abc import Callable, Generator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

import anyio
import anyio.to_thread

from lightning_bus import messages as m
from lightning_bus import wire
from lightning_bus.broker import access, core
from lightning_bus.broker.door import Door
from lightning_bus.broker.fetching import Fetching
from lightning_bus.broker.housekeeping import Retention, cut_off_revoked
from lightning_bus.broker.outbox import LARGE_BYTES, Outbox, Windows
from lightning_bus.clock import monotonic_s, wall_ns
from lightning_bus.config import BrokerSection
from lightning_bus.errors import BusyError, LightningBusError, MessageTooLarge
from lightning_bus.keys import KeyRing, keys_directory
from lightning_bus.log.base import Log
from lightning_bus.log.store import LogWriter
from lightning_bus.transport import Arrived, Router, bind_router

# One transaction: long enough to amortise the fsync, short enough that the next one's bytes arrive meanwhile. With 8 MiB
# the same four batches on the way of two producers gave a quarter fewer spans a second.
GROUP_BYTES_MAX = 2 << 20
BUSY_BYTES = 128 << 20  # decided but not yet durable; above this nothing large is taken on: come back later
QUEUE_BYTES_MAX = 256 << 20  # and above this the broker stops reading and TCP pushes back, on heartbeats too
BUSY_S = 0.25  # in which the disk makes half of that durable
TICK_S = 0.1
# New objects before Python looks for cycles among them, and how often before it looks further. At its own 700, 10, 10 the
# looking took a twentieth of the broker's time.
GARBAGE = 50_000, 50, 100


async def serve_broker(
    section: BrokerSection, log_dir: Path, secret: bytes, *, started: Callable[[str], None] | None = None
) -> None:
    """Run the broker until cancelled; what it has decided by then is durable when this returns.

    `started` is called with the bound address. Raises StorageError when the disk refuses data.
    """
    directory = keys_directory(section.keys, log_dir.parent)
    keyring = None if directory is None else KeyRing.load(directory)
    log = LogWriter(log_dir, map_bytes_max=section.map_bytes_max, segment_bytes=section.segment_bytes)
    try:
        channel, address = bind_router(section.bind, keyring)
        with channel, _rare_collections():
            state = core.restore(
                log.load(), secret=secret, lease_s=section.lease_s, max_attempts=section.max_attempts,
                queued_max=section.queued_max, now_s=monotonic_s(), wall_ns=wall_ns(),
            )  # fmt: skip
            gc.freeze()  # what was loaded is kept, so there is no use in looking at it again and again
            server = BrokerServer(state, log, channel, section)
            if started is not None:
                started(address)
            await server.run(keyring)
    finally:
        log.close()


class BrokerServer:
    """The loop, the committer and the queue between them."""

    def __init__(self, state: core.BrokerState, log: Log, channel: Router, section: BrokerSection) -> None:
        self._state = state
        self._log = log
        self._channel = channel
        self._section = section
        self._queue: queue.SimpleQueue[tuple[core.Effects, int] | None] = queue.SimpleQueue()
        self._group = core.Effects()  # and not posted yet
        self._decided_bytes = 0  # since the broker started
        self._posted_bytes = 0
        self._durable_bytes = 0  # of those; what lies between waits for the disk
        self._room = anyio.Event()
        self._outbox = Outbox(channel)
        self._windows = Windows()
        self._fetching = Fetching(self._read, self._answer_fetch, self._windows, state.next_offset)
        self._retention = Retention(state, log, section, self._decide_unasked, self._mark)
        self._door = Door()
        self._loops = anyio.CancelScope(shield=True)
        self._event_loop = asyncio.get_running_loop()
        self._draining_until_s: float | None = None

    async def run(self, keyring: KeyRing | None = None) -> None:
        """Serve until cancelled, and then until drained. Raises StorageError when the disk refuses data."""
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._commit)
                tasks.start_soon(self._serve, keyring)
                try:
                    await anyio.sleep_forever()
                finally:
                    self._drain()
        finally:
            self._outbox.flush()

    async def _serve(self, keyring: KeyRing | None) -> None:
        """Told to stop, go on until nothing is held any more: see `_drain`."""
        try:
            with self._loops:
                async with anyio.create_task_group() as loops:
                    loops.start_soon(self._receive)
                    loops.start_soon(self._tick)
                    loops.start_soon(self._fetching.serve_for_ever)
                    loops.start_soon(self._retention.run_for_ever)
                    if keyring is not None:
                        loops.start_soon(cut_off_revoked, keyring, self._state, self._decide_unasked)
        finally:
            self._queue.put(None)  # the committer drains what was decided, then ends

    def _drain(self) -> None:
        """Begin to end. Idle it ends at once."""
        self._state.draining = True
        self._draining_until_s = monotonic_s() + self._section.drain_s
        self._end_when_drained(monotonic_s())

    def _end_when_drained(self, now_s: float) -> None:
        if self._draining_until_s is not None and (not self._held() or now_s >= self._draining_until_s):
            self._loops.cancel()

    def _held(self) -> int:
        """How many attempts are with workers."""
        return len(self._state.table.leases)

    async def _receive(self) -> None:
        while True:
            for arrived in await self._channel.receive():
                self._on_arrived(arrived)
            while self._queued_bytes > QUEUE_BYTES_MAX:
                self._room = anyio.Event()
                await self._room.wait()

    async def _tick(self) -> None:
        while True:
            await anyio.sleep(TICK_S)
            now_s = monotonic_s()
            self._decide_unasked(core.tick(self._state, now_s, wall_ns()))
            self._state.refused.update({r: n - self._state.refused[r] for r, n in self._channel.refused.items()})
            self._fetching.tick(now_s)
            self._end_when_drained(now_s)

    # -- what comes in

    def _on_arrived(self, arrived: Arrived) -> None:
        identity, _, frames, role = arrived
        now_s = monotonic_s()
        if not self._door.admits(identity, now_s):
            return
        peer = identity.decode("utf-8", "replace")
        try:
            messages = wire.split(wire.decode(frames))
        except LightningBusError as exc:
            # The request number may be unreadable too; clients take an ERROR for request 0 as one for all of them.
            self._door.could_not_read(identity, now_s)
            self._refuse(peer, 0, exc)
            return
        self._door.could_read(identity)
        size = sum(map(len, frames))
        for message in messages:
            if isinstance(message, wire.Unreadable):
                self._refuse(peer, message.request, message.error)
            elif self._on_message(peer, message, role, size, now_s):
                size = 0  # all of a bundle is counted with the first decision in it
        self._post()

    def _on_message(self, peer: str, message: wire.Message, role: str, size: int, now_s: float) -> bool:
        """Handle one message; true when that left something for the committer."""
        header, body, blobs = message
        try:
            self._check_room(body)
            if isinstance(body, m.Fetch):
                access.check(role, body)
                self._fetching.ask(peer, header.request, body, now_s)
                return False
        except LightningBusError as exc:
            self._refuse(peer, header.request, exc)
            return False
        effects = core.handle(self._state, peer, header, body, blobs, now_s=now_s, wall_ns=wall_ns(), role=role)
        self._decide(effects, size)
        return bool(effects.writes or effects.sends)

    def _check_room(self, body: m.Body) -> None:
        """Raise BusyError for what cannot be taken on now. Heartbeats and results always are."""
        if self._queued_bytes > BUSY_BYTES and isinstance(body, m.Append | m.Submit | m.Put):
            raise BusyError(
                f"{self._queued_bytes >> 20} MiB wait for the disk; the limit is {BUSY_BYTES >> 20} MiB.", BUSY_S
            )
        if self._draining_until_s is not None and isinstance(body, m.Submit | m.Replay):
            raise BusyError("this broker is stopping and takes no new rollouts. Send them again when it is back.")

    def _decide(self, effects: core.Effects, size: int) -> None:
        """Keep what was decided for the next `_post`."""
        if effects.writes or effects.sends:
            self._group.writes += effects.writes
            self._group.sends += effects.sends
            self._decided_bytes += size or 1

    def _post(self) -> None:
        """Give the committer what was decided since the last time: a bundle is one group to it, not one and the rest."""
        size = self._decided_bytes - self._posted_bytes
        if size:
            self._posted_bytes = self._decided_bytes
            decided, self._group = self._group, core.Effects()
            self._queue.put((decided, size))

    def _decide_unasked(self, effects: core.Effects) -> None:
        self._decide(effects, 0)
        self._post()

    def _mark(self) -> Callable[[], bool]:
        """Return what tells whether everything that is decided by now is durable."""
        decided_bytes = self._decided_bytes
        return lambda: self._durable_bytes >= decided_bytes

    @property
    def _queued_bytes(self) -> int:
        return self._decided_bytes - self._durable_bytes

    # -- the committer

    async def _commit(self) -> None:
        try:
            await self._commit_in_thread()
        finally:
            self._loops.cancel()  # without a log there is nothing to serve

    async def _commit_in_thread(self) -> None:
        await anyio.to_thread.run_sync(self._commit_groups)

    def _commit_groups(self) -> None:
        """The committer thread: take what is queued, one transaction, fsync, then hand the replies back.

        While the loop sends the replies of one group the next is being written; no more than that runs ahead.
        """
        ending = False
        sent: Future[None] | None = None
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
            offset = self._log.end_offset
            if sent is not None:
                sent.result()
            sent = Future()
            self._event_loop.call_soon_threadsafe(self._hand_back, sent, sends, offset, size)
        if sent is not None:
            sent.result()

    def _hand_back(self, sent: Future[None], sends: list[core.Send], offset: int, size: int) -> None:
        try:
            self._on_durable(sends, offset, size)
        except BaseException as exc:
            sent.set_exception(exc)
            self._queue.put(None)  # the committer ends, and with it the broker
        else:
            sent.set_result(None)

    def _on_durable(self, sends: list[core.Send], offset: int, size: int) -> None:
        # Commit, then reply. A worker that holds an ack may forget the span, so from that moment the log owns the
        # only copy.
        for send in sends:
            self._send(send.peer.encode(), send)
        self._durable_bytes += size
        if self._queued_bytes <= QUEUE_BYTES_MAX:
            self._room.set()
        self._fetching.durable(offset)

    # -- what goes out

    def _send(self, identity: bytes, send: core.Send, blobs: list[bytes] | None = None) -> bool:
        """Send, or drop: a reply that cannot be delivered is asked for again, a task that is lost is sent again."""
        try:
            packed = wire.pack(send.body, blobs or (), request=send.request)
        except MessageTooLarge as exc:
            text = f"the answer is too large; ask for less at a time. {exc}"
            packed = wire.pack(m.Error("MessageTooLarge", text), request=send.request)
        if packed.size >= LARGE_BYTES:
            if packed.op is m.Op.CHUNK:
                return self._outbox.put_alone(identity, packed)
            if packed.op is not m.Op.TASK:  # of those a worker has as many as it said it can hold
                if self._windows.room(send.peer, packed.size):
                    self._windows.sent(send.peer, packed.size, monotonic_s())
                else:
                    text = "large answers to this client are under way that it has not taken yet."
                    packed = wire.pack(m.Error("BusyError", text, 1.0), request=send.request)
        self._outbox.put(identity, packed)
        return True

    def _refuse(self, peer: str, request: int, exc: LightningBusError) -> None:
        self._send(peer.encode(), core.refuse(self._state, peer, request, exc))

    def _answer_fetch(self, peer: str, request: int, body: m.Body, values: list[bytes]) -> bool:
        return self._send(peer.encode(), core.Send(peer, request, body), values)

    async def _read(self, offset: int, bytes_max: int) -> tuple[list[bytes], int]:
        return await anyio.to_thread.run_sync(self._log.read, offset, bytes_max)


@contextmanager
def _rare_collections() -> Generator[None]:
    """Let Python look for cycles seldom: what a broker keeps is many objects, and those it drops have hardly any."""
    before = gc.get_threshold()
    gc.set_threshold(*GARBAGE)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()
