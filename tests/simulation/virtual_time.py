"""An event loop whose clock is a number: an hour of waiting takes no time, and the same program runs the same way.

When nothing is ready the loop does not sleep, it sets its clock to the next timer. There are no threads and no files
in it, so the order in which things happen depends on the program and its seed alone. A program in which nothing can
ever happen again is an error, not a hang.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine, Generator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest import mock

from lightning_bus import clock

START_S = 1000.0
WALL_START_NS = 1_700_000_000_000_000_000


class NothingWillEverHappen(RuntimeError):
    """Every task waits for another one."""


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
        super().__init__(self._virtual)

    def time(self) -> float:
        return self._virtual.now_s

    # What `lightning_bus.clock` asks of the standard library's `time`.

    def monotonic(self) -> float:
        return self._virtual.now_s

    def time_ns(self) -> int:
        return WALL_START_NS + self.wall_shift_ns + int((self._virtual.now_s - START_S) * 1e9)


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
