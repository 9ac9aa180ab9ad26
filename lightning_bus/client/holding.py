"""The attempts a worker holds: kept by heartbeats, ended by a report, lost when the broker says so.

    async for task in leases ──► done       the agent returned
                             ├─► fail       it did not
                             ├─► nack       not now, says the agent: again later
                             ├─► release    not by us: as if it had never begun
                             └─► (lost)     given to another worker, timed out or cancelled: nothing is left to report

What always holds: an attempt that was ended or lost never comes back. A task that nobody here will run, because it
crossed our `stop` on the way, is handed back at once and costs its rollout no attempt.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Sequence

import anyio

from lightning_bus import messages as m
from lightning_bus.client.session import Session
from lightning_bus.client.spool import check_blob
from lightning_bus.errors import FencedError, NotFound, RemoteProtocolError, TryAgain
from lightning_bus.spans import Span, encode_spans

BEATS_PER_LEASE = 5
FINISHED_MAX = 10_000  # attempts remembered, so that a task sent twice is not run twice
RETURN_LIMIT_S = 2.0  # for handing back what nobody began; after that the leases run out


class Leases:
    """The attempts this process holds. Iterate for new tasks; end each with `done`, `fail`, `nack` or `release`."""

    def __init__(self, session: Session, slots: int, task_bytes_max: int = 0) -> None:
        self._session = session
        self._slots = slots
        self._task_bytes_max = task_bytes_max
        self._held: dict[tuple[str, int], m.Task] = {}
        self._finished: OrderedDict[tuple[str, int], None] = OrderedDict()
        self._lost_callbacks: dict[tuple[str, int], Callable[[], None]] = {}
        self._arrived: deque[m.Task] = deque()
        self._unwanted: deque[m.Task] = deque()  # arrived after `stop`
        self._changed = anyio.Event()
        self._stopped = anyio.Event()
        self._beat_now = anyio.Event()
        self._beats_for_s = session.welcome.lease_s  # the shortest lease when the next beat was set

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

    async def nack(self, task: m.Task, delay_s: float, reason: str = "") -> None:
        """Put the task back for `delay_s`: the agent cannot do it now. The attempt counts like one that failed."""
        await self._finish(task, m.Nack(task.rollout_id, task.attempt, delay_s, reason))

    async def release(self, task: m.Task) -> None:
        """Hand the task back, to be leased to anybody at once. The attempt does not count."""
        await self._finish(task, m.Release(task.rollout_id, task.attempt))

    def on_lost(self, task: m.Task, callback: Callable[[], None]) -> None:
        """Call back, once, when the broker says that this attempt is no longer ours; at once if it said so already."""
        key = task.rollout_id, task.attempt
        if key in self._held:
            self._lost_callbacks[key] = callback
        else:
            callback()

    def stop(self) -> None:
        """Take no more tasks. The iterator ends; attempts in hand stay ours until they are reported."""
        if self._stopped.is_set():
            return
        self._slots = 0
        self._stopped.set()
        self._changed.set()
        # The broker should know before anything is handed back, or it hands it to us again. Lost, the beat repeats it.
        self._session.tell(self._standing())
        self._beat_now.set()

    def take(self, task: m.Task) -> None:
        """A task arrived. One that is in hand or was finished is the broker repeating itself, and is ignored.

        One that crossed our `stop` on the way is handed back: held, it would be kept by heartbeats and run by nobody.
        """
        key = task.rollout_id, task.attempt
        if key in self._held or key in self._finished:
            return
        if self._stopped.is_set():
            self._unwanted.append(task)
            self._beat_now.set()
            return
        if task.lease_s < self._beats_for_s:
            self._beat_now.set()  # the beat that is due next may come too late for this one
        self._held[key] = task
        self._arrived.append(task)
        self._changed.set()

    async def beat_for_ever(self) -> None:
        """Tell the broker what we hold, as often as the shortest lease among it needs."""
        while True:
            self._beat_now = anyio.Event()
            self._beats_for_s = self._shortest_lease_s()
            interval_s = self._beats_for_s / BEATS_PER_LEASE
            await self._beat(interval_s)
            await self._return_unwanted()
            with anyio.move_on_after(interval_s):
                await self._beat_now.wait()

    async def return_unbegun(self) -> None:
        """Stop, and hand back what was never taken from the iterator; for the end of a worker."""
        self.stop()
        self._unwanted.extend(task for task in self._arrived if (task.rollout_id, task.attempt) in self._held)
        self._arrived.clear()
        with anyio.move_on_after(RETURN_LIMIT_S, shield=True):
            await self._return_unwanted()

    def _shortest_lease_s(self) -> float:
        return min((task.lease_s for task in self._held.values()), default=self._session.welcome.lease_s)

    def _standing(self) -> m.Heartbeat:
        return m.Heartbeat(self._slots, [m.Held(*key) for key in self._held], self._task_bytes_max)

    async def _beat(self, interval_s: float) -> None:
        try:
            lost = (await self._session.ask(self._standing(), m.Beat, resend_s=interval_s)).lost
        except (TryAgain, RemoteProtocolError):
            return  # away, busy or unreadable: a beat was lost. Whether our leases live on is the broker's to say
        for attempt in lost:
            key = attempt.rollout_id, attempt.attempt
            self._forget(key)
            callback = self._lost_callbacks.pop(key, None)
            if callback is not None:
                callback()

    async def _return_unwanted(self) -> None:
        while self._unwanted:
            task = self._unwanted.popleft()
            try:
                await self.release(task)
            except (FencedError, NotFound, TryAgain, RemoteProtocolError):
                pass  # it is another's by now, or will be when the lease runs out

    async def _finish(self, task: m.Task, body: m.Body, spans: Sequence[Span] = ()) -> None:
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
