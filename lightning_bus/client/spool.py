"""Spans on their way to the log: numbered batches, one at a time, until each is acknowledged.

While a batch is on its way, what comes in piles up and travels in the next one, so the batches grow with the load.
The number is what makes a resend safe: the broker takes each once, however often it arrives.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from contextlib import contextmanager

import anyio

from lightning_bus import messages as m
from lightning_bus import wire
from lightning_bus.client.session import Reply, Session
from lightning_bus.errors import BrokenError, FencedError, LightningBusError, MessageTooLarge

SPOOL_BYTES_MAX = 64 << 20  # spans waiting for the broker; above this `append` waits
BATCH_BYTES_MAX = 8 << 20


class Spooled:
    """One caller's chunk, and the answer it waits for."""

    __slots__ = ("blob", "part", "reply")

    def __init__(self, part: m.Part, blob: bytes) -> None:
        self.part = part
        self.blob = blob
        self.reply = Reply[None]()


class Spool:
    """The queue of one producer. `flush_for_ever` must be running in a task of its own."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._seq = 0
        self._waiting: deque[Spooled] = deque()
        self._waiting_bytes = 0
        self._batch: list[Spooled] = []  # on its way
        self._filled = anyio.Event()
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
        self._filled.set()
        with self._limited(limit):
            await spooled.reply.wait()

    async def flush_for_ever(self) -> None:
        """Send batch after batch for as long as the session lives."""
        while True:
            while not self._waiting:
                self._filled = anyio.Event()
                await self._filled.wait()
            self._batch = self._take_batch()
            self._seq += 1
            try:
                acked = await self._session.ask(
                    m.Append([spooled.part for spooled in self._batch]),
                    m.Acked,
                    [spooled.blob for spooled in self._batch],
                    seq=self._seq,
                    count=sum(spooled.part.count for spooled in self._batch),
                    limit_s=float("inf"),
                )
            except LightningBusError as exc:
                for spooled in self._batch:
                    spooled.reply.fail(exc)
                await self._resume_numbers()
            else:
                self._deliver(acked)

    def close(self, error: LightningBusError) -> None:
        """Fail whoever still waits."""
        for spooled in (*self._batch, *self._waiting):
            spooled.reply.fail(error)

    def _deliver(self, acked: m.Acked) -> None:
        for index, spooled in enumerate(self._batch):
            if index not in acked.fenced:
                spooled.reply.set(None)
                continue
            part = spooled.part
            spooled.reply.fail(
                FencedError(
                    f"rollout {part.rollout_id} attempt {part.attempt} is over or was given to another worker. "
                    f"Its {part.count} span(s) were not kept."
                )
            )

    async def _resume_numbers(self) -> None:
        """Go on from the number that the broker has."""
        try:
            self._seq = (await self._session.greet_again()).seq_last
        except LightningBusError:
            return  # then the next batch is refused too, and asks again

    def _take_batch(self) -> list[Spooled]:
        batch: list[Spooled] = []
        size = 0
        while self._waiting and len(batch) < wire.BLOBS_MAX:
            if batch and size + len(self._waiting[0].blob) > BATCH_BYTES_MAX:
                break
            spooled = self._waiting.popleft()
            size += len(spooled.blob)
            batch.append(spooled)
        self._waiting_bytes -= size
        self._drained.set()
        self._drained = anyio.Event()
        return batch

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
