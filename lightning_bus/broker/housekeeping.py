"""What a broker does now and then: drop what of the log nobody needs any more, and cut off whose key was revoked.

What always holds: retention looks at cursors as they are on disk. One that has moved in memory only would go back in
a crash, to records that were dropped meanwhile.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import anyio
import anyio.lowlevel
import anyio.to_thread

from lightning_bus.broker import core
from lightning_bus.clock import monotonic_s, wall_ns
from lightning_bus.config import BrokerSection
from lightning_bus.keys import KeyRing
from lightning_bus.log.base import Log
from lightning_bus.log.retention import droppable, held_back

RETAIN_EVERY_S = 5.0
KEYS_EVERY_S = 1.0

logger = logging.getLogger("lightning_bus.broker")


class Retention:
    """Drops segments within the limits of [broker] retain_s, retain_bytes and drop_read."""

    def __init__(
        self, state: core.BrokerState, log: Log, section: BrokerSection, decide: Callable[[core.Effects], None],
        mark: Callable[[], Callable[[], bool]],
    ) -> None:  # fmt: skip
        """`decide` queues effects; `mark` returns what tells whether all that is decided by then is on disk."""
        self._state = state
        self._log = log
        self._section = section
        self._decide = decide
        self._mark = mark
        self._cursors: dict[str, int] = {}  # as they were in memory at that mark
        self._durable: Callable[[], bool] | None = None
        self._warning: str | None = None

    async def run_for_ever(self) -> None:
        section = self._section
        if not (section.retain_s or section.retain_bytes or section.drop_read):
            return
        while True:
            await self.drop()
            await anyio.sleep(RETAIN_EVERY_S)

    async def drop(self) -> None:
        """Drop what may be dropped, judged by the cursors of the last call; forget the rollouts that ended there."""
        if self._durable is not None and self._durable():
            cursors = {**self._state.cursors, **self._cursors}  # new ones count, whether they are on disk or not
            segments = self._log.segments()
            self._warn(held_back(segments, cursors, self._section, wall_ns()))
            offset = droppable(segments, cursors, self._section, wall_ns())
            if offset is not None:
                first_offset = await anyio.to_thread.run_sync(self._log.drop_before, offset)
                logger.info("retention: the log begins at %d now", first_offset)
        while (effects := core.forget(self._state, self._log.first_offset)).writes:
            self._decide(effects)
            await anyio.lowlevel.checkpoint()
        self._cursors, self._durable = dict(self._state.cursors), self._mark()

    def _warn(self, warning: str | None) -> None:
        if warning is not None and self._warning is None:
            logger.warning("%s", warning)
        self._warning = warning


async def cut_off_revoked(ring: KeyRing, state: core.BrokerState, decide: Callable[[core.Effects], None]) -> None:
    """Look at the keys every second. What those who lost theirs held goes to others at once.

    What they still send does not come in, and nothing goes out to them: `transport.Router` sees to that.
    """
    while True:
        await anyio.sleep(KEYS_EVERY_S)
        for name in await anyio.to_thread.run_sync(ring.refresh):
            logger.warning("the key %s was revoked: its connections are cut off", name)
            prefix = f"{name}/"  # of all names that this key's connections may have
            for peer in [peer for peer in {**state.table.workers, **state.table.held_by} if peer.startswith(prefix)]:
                decide(core.drop_peer(state, peer, monotonic_s(), wall_ns()))
