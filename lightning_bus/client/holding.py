"""The attempts a worker holds: kept by heartbeats, ended by a report, lost when the broker says so."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Sequence

import anyio

from lightning_bus import messages as m
from lightning_bus.client.session import Session
from lightning_bus.client.spool import check_blob
from lightning_bus.errors import BrokenError, RemoteProtocolError
from lightning_bus.spans import Span, encode_spans

BEATS_PER_LEASE = 5
FINISHED_MAX = 10_000  # attempts remembered, so that a task sent twice is not run twice


class Leases:
    """The attempts this process holds. Iterate for new tasks; end each with `done` or `fail`."""

    def __init__(self, session: Session, slots: int) -> None:
        self._session = session
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
            lost: list[m.Held] = []
            try:
                lost = (await self._session.ask(m.Heartbeat(slots, held), m.Beat, resend_s=interval_s)).lost
            except (BrokenError, RemoteProtocolError):
                pass  # away, or unreadable: a beat was lost. Whether our leases live on is the broker's to say
            for attempt in lost:
                key = attempt.rollout_id, attempt.attempt
                self._forget(key)
                callback = self._lost_callbacks.pop(key, None)
                if callback is not None:
                    callback()
            with anyio.move_on_after(interval_s):
                # That we stopped the broker should know at once, or it goes on sending.
                await (self._stopped.wait() if slots else anyio.sleep_forever())

    async def _finish(self, task: m.Task, body: m.Body, spans: Sequence[Span]) -> None:
        key = task.rollout_id, task.attempt
        blobs = [encode_spans(spans)] if spans else []
        for blob in blobs:
            check_blob(blob)
        try:
            await self._session.ask(body, m.Accepted, blobs, count=len(spans))
        finally:
            self._forget(key)
            self._lost_callbacks.pop(key, None)

    def _forget(self, key: tuple[str, int]) -> None:
        """Ended or lost, an attempt never comes back: a TASK that still names it is an old one, late."""
        self._held.pop(key, None)
        self._finished[key] = None
        if len(self._finished) > FINISHED_MAX:
            self._finished.popitem(last=False)
