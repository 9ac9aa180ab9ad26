"""Spans on their way to the log: numbered batches, several at a time, until each is acknowledged.

While batches are on their way, what comes in piles up and travels in the next one, so the batches grow with the load.
The number is what makes a resend safe: the broker takes each once, in the order of their numbers, however often it
arrives. Three rules keep that true with several on the way:

The window is counted in numbers, not in batches. The broker remembers the verdicts of its last `append_batches_max`
batches; one whose acknowledgement was lost is asked about again, and must still be among them. So the newest number
on its way is never further from the oldest unacknowledged one than that.

A gap closes from its lower end. To a batch that came before its turn the broker answers RESYNC and keeps nothing. What
is missing is then sent again at once, and whoever came too early waits for its predecessor's acknowledgement before
it goes again: each batch is hurried once at most, so that no storm comes of it.

A batch that was refused, or whose fate is unknown, ends the epoch. Its number cannot be given to another batch: a copy
of it may still be under way, and what comes second would be taken for a resend of the first (`Session.greet_again`).
Nor can those after it be sent again under other numbers: if a copy of it is taken after all, late, so are copies of
them, until the new epoch fences them all. Whether that happened nobody can tell, so their callers are told just that.
Those before it do not depend on it; they are waited for, and only then does the new epoch begin. What was never sent
waits meanwhile, and travels in the new epoch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from contextlib import contextmanager

import anyio

from lightning_bus import messages as m
from lightning_bus import wire
from lightning_bus.client.session import Reply, Session
from lightning_bus.errors import BrokenError, FencedError, LightningBusError, MessageTooLarge, RemoteProtocolError

SPOOL_BYTES_MAX = 64 << 20  # spans waiting for the broker; above this `append` waits
# Four of these on their way keep the broker's disk busy. Larger ones make no larger transactions, only longer waits.
BATCH_BYTES_MAX = 1 << 20
FULL_BYTES = 1 << 20  # what makes a batch worth sending while another is on its way; less waits for company


class Spooled:
    """One caller's chunk, and the answer it waits for."""

    __slots__ = ("blob", "part", "reply")

    def __init__(self, part: m.Part, blob: bytes) -> None:
        self.part = part
        self.blob = blob
        self.reply = Reply[None]()


class Batch:
    """Chunks that travel together, and where they stand."""

    __slots__ = ("attempt", "chunks", "hurried", "over", "seq", "size")

    def __init__(self, seq: int, chunks: list[Spooled]) -> None:
        self.seq = seq
        self.chunks = chunks
        self.size = sum(len(spooled.blob) for spooled in chunks)
        self.attempt = anyio.CancelScope()  # around one asking; cancelled to ask anew at once
        self.hurried = False
        self.over = anyio.Event()  # acknowledged, or failed


class Spool:
    """The queue of one producer. `flush_for_ever` must be running in a task of its own."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._seq = 0
        self._waiting: deque[Spooled] = deque()
        self._waiting_bytes = 0
        self._on_way: dict[int, Batch] = {}  # by number, oldest first
        self._on_way_bytes = 0
        self._failed: Batch | None = None  # this epoch is over
        self._changed = anyio.Event()
        self._drained = anyio.Event()

    async def append(self, part: m.Part, blob: bytes) -> None:
        """Return once the chunk is durable. See Client.append for what is raised."""
        check_blob(blob)
        self._session.open_channel()
        limit = anyio.current_time() + self._session.limit_s
        while self._waiting_bytes > SPOOL_BYTES_MAX:
            with self._limited(limit):
                await self._drained.wait()
        spooled = Spooled(part, blob)
        self._waiting.append(spooled)
        self._waiting_bytes += len(blob)
        self._changed.set()
        with self._limited(limit):
            await spooled.reply.wait()

    async def flush_for_ever(self) -> None:
        """Send batch after batch for as long as the session lives."""
        async with anyio.create_task_group() as tasks:
            while True:
                await self._until(lambda: self._failed is not None or self._may_send())
                if self._failed is not None:
                    await self._until(lambda: not self._on_way)
                    await self._begin_epoch()
                    continue
                self._seq += 1
                batch = self._on_way[self._seq] = Batch(self._seq, self._take_chunks())
                self._on_way_bytes += batch.size
                tasks.start_soon(self._carry, batch)

    def close(self, error: LightningBusError) -> None:
        """Fail whoever still waits."""
        for batch in self._on_way.values():
            _fail(batch.chunks, error)
        _fail(self._waiting, error)

    async def _carry(self, batch: Batch) -> None:
        """Ask about one batch until it is over."""
        try:
            acked = await self._wait_acked(batch)
        except LightningBusError as exc:
            _fail(batch.chunks, exc)
            self._end_epoch(batch)
        else:
            if acked is not None:
                _deliver(batch, acked)
        del self._on_way[batch.seq]  # but not when the client is being closed: `close` tells who waits
        self._on_way_bytes -= batch.size
        batch.over.set()
        self._changed.set()

    async def _wait_acked(self, batch: Batch) -> m.Acked | None:
        """Return the broker's verdict, or None when the epoch ended before there was one."""
        body = m.Append([spooled.part for spooled in batch.chunks])
        blobs = [spooled.blob for spooled in batch.chunks]
        count = sum(spooled.part.count for spooled in batch.chunks)
        while self._failed is None or batch.seq < self._failed.seq:
            first = next(iter(self._on_way)) == batch.seq
            with anyio.CancelScope() as batch.attempt:
                answer = await self._session.exchange(body, blobs, seq=batch.seq, count=count, limit_s=float("inf"))
                if isinstance(answer.body, m.Acked):
                    return answer.body
                if not isinstance(answer.body, m.Resync):
                    raise RemoteProtocolError(f"the broker answered APPEND with {type(answer.body).__name__}")
                if first:
                    raise RemoteProtocolError(
                        f"the broker has batches up to {answer.body.seq_last} of {self._session.producer}, but has "
                        f"acknowledged all before {batch.seq}. Was its log restored from a backup?"
                    )
                self._hurry(answer.body.seq_last + 1)
                await self._predecessor(batch)
        return None

    def _hurry(self, seq: int) -> None:
        """Send a batch that the broker misses again now, and not when its answer is overdue."""
        missing = self._on_way.get(seq)
        if missing is not None and not missing.hurried:
            missing.hurried = True
            missing.attempt.cancel()

    async def _predecessor(self, batch: Batch) -> None:
        """Return when the batch before this one is over."""
        before = self._on_way.get(batch.seq - 1)
        if before is not None:
            await before.over.wait()

    def _end_epoch(self, failed: Batch) -> None:
        """Take no more batches in this epoch, and give up those that came after the failed one."""
        if self._failed is None or failed.seq < self._failed.seq:
            self._failed = failed
        unknown = BrokenError(
            f"the batch before this one was not taken by the broker at {self._session.address}, so these spans may or "
            "may not have been kept. Append them again if they are worth being there twice."
        )
        for batch in self._on_way.values():
            if batch.seq > failed.seq:
                _fail(batch.chunks, unknown)
                batch.attempt.cancel()
        self._changed.set()

    async def _begin_epoch(self) -> None:
        """Go on from the number that the broker has, in a new epoch; when it refuses one, so is what waits."""
        try:
            self._seq = (await self._session.greet_again()).seq_last
        except BrokenError:
            return  # away; who waits has a limit of their own, and we ask again
        except LightningBusError as exc:
            while self._waiting:
                _fail(self._take_chunks(), exc)
            await self._until(lambda: bool(self._waiting))
        else:
            self._failed = None

    def _may_send(self) -> bool:
        if not self._waiting or not self._on_way:
            return bool(self._waiting)
        terms = self._session.welcome
        return (
            self._waiting_bytes >= FULL_BYTES
            and self._seq + 1 - next(iter(self._on_way)) < terms.append_batches_max
            and self._on_way_bytes + min(self._waiting_bytes, BATCH_BYTES_MAX) <= terms.append_bytes_max
        )

    def _take_chunks(self) -> list[Spooled]:
        taken: list[Spooled] = []
        size = 0
        while self._waiting and len(taken) < wire.BLOBS_MAX:
            if taken and size + len(self._waiting[0].blob) > BATCH_BYTES_MAX:
                break
            spooled = self._waiting.popleft()
            size += len(spooled.blob)
            taken.append(spooled)
        self._waiting_bytes -= size
        self._drained.set()
        self._drained = anyio.Event()
        return taken

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._changed = anyio.Event()
            await self._changed.wait()

    @contextmanager
    def _limited(self, until: float) -> Generator[None]:
        with anyio.move_on_at(until) as scope:
            yield
        if scope.cancelled_caught:
            raise BrokenError(
                f"the broker at {self._session.address} did not answer APPEND within {self._session.limit_s:g} s. "
                "Is it running, and is its disk keeping up?"
            )


def check_blob(blob: bytes) -> None:
    """Raise MessageTooLarge for a chunk that no message carries."""
    if len(blob) > m.BLOB_BYTES_MAX:
        raise MessageTooLarge(
            f"a chunk of {len(blob)} bytes exceeds the limit of {m.BLOB_BYTES_MAX}. "
            "Append fewer spans at a time, or keep large objects in a file and record the path."
        )


def _deliver(batch: Batch, acked: m.Acked) -> None:
    fenced = frozenset(acked.fenced)
    for index, spooled in enumerate(batch.chunks):
        if index not in fenced:
            spooled.reply.set(None)
            continue
        part = spooled.part
        spooled.reply.fail(
            FencedError(
                f"rollout {part.rollout_id} attempt {part.attempt} is over or was given to another worker. "
                f"Its {part.count} span(s) were not kept."
            )
        )


def _fail(chunks: list[Spooled] | deque[Spooled], error: LightningBusError) -> None:
    for spooled in chunks:
        spooled.reply.fail(error)
