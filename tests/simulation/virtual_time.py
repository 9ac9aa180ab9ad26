"""An event loop whose clock is a number: an hour of waiting takes no time, and the same program runs the same way.

When nothing is ready the loop does not sleep, it sets its clock to the next timer. There are no threads and no files
in it, so the order in which things happen depends on the program and its seed alone. A program in which nothing can
ever happen again is an error, not a hang.

What runs on the loop may be divided into processes, each of which can be paused as SIGSTOP does: it does nothing until
it goes on, and then all that has come and all that is overdue at once.
"""

from __future__ import annotations

import asyncio
import contextvars
import heapq
import selectors
from collections.abc import Callable, Coroutine, Generator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest import mock

from lightning_bus import clock

START_S = 1000.0
WALL_START_NS = 1_700_000_000_000_000_000
WALL_STEP_NS = 1_000_000_000_000  # the wall clock jumps by whole steps, and no history is as long as one

process: contextvars.ContextVar[str] = contextvars.ContextVar("process", default="")  # which one this code runs in


def decided_s(wall_ns: int) -> float:
    """Return the virtual time at which the wall clock was read, however it had been moved."""
    return START_S + (wall_ns - WALL_START_NS) % WALL_STEP_NS / 1e9


class NothingWillEverHappen(RuntimeError):
    """Every task waits for another one."""


class Bell:
    """Wakes the one task that waits. An event of anyio would do, at four times the cost."""

    def __init__(self) -> None:
        self._waiter: asyncio.Future[None] | None = None

    def ring(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def wait(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        await self._waiter


class _Clock(selectors.BaseSelector):
    """What the loop believes to be its selector: waiting for files is where the time passes."""

    def __init__(self) -> None:
        self.now_s = START_S

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise NothingWillEverHappen(f"at {self.now_s - START_S:.3f} s every task waits for another one")
        self.now_s += max(0.0, timeout)
        return []

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        return selectors.SelectorKey(fileobj, 0, events, data)  # the loop's own pipe, which nobody writes to

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        raise KeyError(fileobj)

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return {}


class VirtualLoop(asyncio.SelectorEventLoop):
    """asyncio on virtual time. `wall_shift_ns` is how far an administrator has moved the wall clock."""

    def __init__(self) -> None:
        self._virtual = _Clock()
        self.wall_shift_ns = 0
        # process → what waits for it to go on: timers, and what would run at once
        self._paused: dict[str, tuple[list[asyncio.TimerHandle], list[asyncio.Handle]]] = {}
        super().__init__(self._virtual)

    def pause(self, name: str) -> None:
        """Let the process do nothing from now on, beyond what it was to do at this very moment."""
        timers: list[asyncio.TimerHandle] = self._scheduled  # type: ignore[attr-defined]
        self._paused[name] = [timer for timer in timers if _process_of(timer) == name], []
        timers[:] = [timer for timer in timers if _process_of(timer) != name]
        heapq.heapify(timers)
        # Where asyncio takes in what is to be done, later and now. Only then, for it is the hottest path there is.
        self.call_at, self._call_soon = self._call_at_or_hold, self._call_soon_or_hold

    def go_on(self, name: str) -> None:
        """Let a paused process go on; what is overdue happens now."""
        timers, ready = self._paused.pop(name, ((), ()))
        for timer in timers:
            heapq.heappush(self._scheduled, timer)  # type: ignore[attr-defined]
        self._ready.extend(ready)  # type: ignore[attr-defined]
        if not self._paused and "call_at" in vars(self):
            del self.call_at, self._call_soon

    def _call_at_or_hold(
        self, when: float, callback: Any, *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.TimerHandle:
        timer = super().call_at(when, callback, *args, context=context)
        held = self._paused.get(_process_of(timer))
        if held is not None:
            self._scheduled.remove(timer)  # type: ignore[attr-defined]
            heapq.heapify(self._scheduled)  # type: ignore[attr-defined]
            held[0].append(timer)
        return timer

    def _call_soon_or_hold(self, callback: Any, args: Any, context: Any) -> asyncio.Handle:
        handle: asyncio.Handle = super()._call_soon(callback, args, context)  # type: ignore[misc]
        held = self._paused.get(_process_of(handle))
        if held is not None:
            held[1].append(self._ready.pop())  # type: ignore[attr-defined]
        return handle

    def time(self) -> float:
        return self._virtual.now_s

    # What `lightning_bus.clock` asks of the standard library's `time`.

    def monotonic(self) -> float:
        return self._virtual.now_s

    def time_ns(self) -> int:
        return WALL_START_NS + self.wall_shift_ns + int((self._virtual.now_s - START_S) * 1e9)


def _process_of(handle: asyncio.Handle) -> str:
    return handle._context.get(process, "")  # type: ignore[attr-defined]


@contextmanager
def virtual_loop() -> Generator[VirtualLoop]:
    """A loop whose time is also the time that the bus reads from its clocks."""
    loop = VirtualLoop()
    try:
        with mock.patch.object(clock, "time", loop):
            yield loop
    finally:
        loop.close()


def run(loop: VirtualLoop, main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run to the end, then end what is left over."""
    try:
        loop.run_until_complete(main())
    finally:
        left = asyncio.all_tasks(loop)
        for task in left:
            task.cancel()
        if left:
            loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
        loop.run_until_complete(loop.shutdown_asyncgens())
