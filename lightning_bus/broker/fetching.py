"""Readers of the log: each FETCH waits for its first record, for room on the way to its peer, and for its turn.

Records are read beside the event loop, because what is far behind the end comes from the disk, and meanwhile nobody's
heartbeat may wait. What always holds: only what is durable is read; how many wait is bounded, for a peer and in all;
a FETCH that is sent again takes the place of the first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import anyio
from anyio.abc import TaskGroup

from lightning_bus import messages as m
from lightning_bus.broker.outbox import Windows
from lightning_bus.errors import BusyError, LightningBusError

WAIT_MS_MAX = 30_000  # longest a FETCH is held open
CHUNK_BYTES_MAX = m.MESSAGE_BYTES_MAX // 2
WAITING_MAX = 10_000
WAITING_PEER_MAX = 64
READS_MAX = 4  # at a time

Read = Callable[[int, int], Awaitable[tuple[list[bytes], int]]]
Answer = Callable[[str, int, m.Body, list[bytes]], bool]


@dataclass(slots=True)
class Waiter:
    """A FETCH that is not answered yet."""

    peer: str
    request: int
    fetch: m.Fetch
    until_s: float
    reading: bool = False


class Fetching:
    """All FETCHes under way. `serve_for_ever` must be running."""

    def __init__(self, read: Read, answer: Answer, windows: Windows, durable_offset: int) -> None:
        self._read = read
        self._answer = answer
        self._windows = windows
        self._durable_offset = durable_offset
        self._waiting: dict[tuple[str, int], Waiter] = {}
        self._of_peer: Counter[str] = Counter()
        self._reads = 0
        self._now_s = 0.0
        self._woken = anyio.Event()

    def ask(self, peer: str, request: int, fetch: m.Fetch, now_s: float) -> None:
        """Take a FETCH on. Raises BusyError when too many wait."""
        self._now_s = now_s
        key = peer, request
        until_s = now_s + min(fetch.wait_ms, WAIT_MS_MAX) / 1000
        known = self._waiting.get(key)
        if known is None:
            if self._of_peer[peer] >= WAITING_PEER_MAX or len(self._waiting) >= WAITING_MAX:
                raise BusyError(
                    f"{self._of_peer[peer]} FETCHes of this client wait and {len(self._waiting)} in all; the limits are "
                    f"{WAITING_PEER_MAX} and {WAITING_MAX}. Ask again when one was answered.",
                    retry_after_s=1.0,
                )
            self._windows.went_on(peer, fetch.offset)
            self._of_peer[peer] += 1
            known = self._waiting[key] = Waiter(peer, request, fetch, until_s)
        elif known.fetch != fetch and not known.reading:
            known.fetch, known.until_s = fetch, until_s
        if self._is_due(known):
            self._woken.set()

    def durable(self, offset: int) -> None:
        """The log is on disk up to this offset."""
        if offset > self._durable_offset:
            self._durable_offset = offset
            if self._waiting:
                self._woken.set()

    def tick(self, now_s: float) -> None:
        """Time passed: waits end, and windows open."""
        self._now_s = now_s
        self._windows.write_off(now_s, lambda peer: self._of_peer[peer] > 1)
        if self._waiting:
            self._woken.set()

    async def serve_for_ever(self) -> None:
        async with anyio.create_task_group() as tasks:
            while True:
                await self._woken.wait()
                self._woken = anyio.Event()
                for waiter in list(self._waiting.values()):
                    if self._is_due(waiter) and not waiter.reading:
                        self._serve(waiter, tasks)

    def _is_due(self, waiter: Waiter) -> bool:
        return waiter.fetch.offset < self._durable_offset or waiter.until_s <= self._now_s

    def _serve(self, waiter: Waiter, tasks: TaskGroup) -> None:
        fetch = waiter.fetch
        if fetch.offset >= self._durable_offset:
            self._end(waiter, m.Chunk(fetch.offset, self._durable_offset), [])
        elif self._reads < READS_MAX and self._windows.room(waiter.peer, min(fetch.bytes_max, CHUNK_BYTES_MAX)):
            waiter.reading = True
            self._reads += 1
            tasks.start_soon(self._read_one, waiter)

    async def _read_one(self, waiter: Waiter) -> None:
        fetch = waiter.fetch
        try:
            values, end_offset = await self._read(fetch.offset, min(fetch.bytes_max, CHUNK_BYTES_MAX))
        except LightningBusError as exc:
            self._end(waiter, m.Error(type(exc).__name__, str(exc)), [])
        else:
            self._end(waiter, m.Chunk(fetch.offset + len(values), end_offset), values)
        finally:
            self._reads -= 1
            self._woken.set()  # somebody may have waited for this turn

    def _end(self, waiter: Waiter, body: m.Body, values: list[bytes]) -> None:
        del self._waiting[waiter.peer, waiter.request]
        self._of_peer[waiter.peer] -= 1
        if not self._of_peer[waiter.peer]:
            del self._of_peer[waiter.peer]
        if self._answer(waiter.peer, waiter.request, body, values) and isinstance(body, m.Chunk) and values:
            self._windows.sent(waiter.peer, sum(map(len, values)), self._now_s, body.next_offset)
