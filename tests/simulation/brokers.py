"""The broker process, its deaths, and the one that comes after it.

`serve_broker`, the loop and every decision are the real ones. Only the committer is a task here and not a thread, so
that it can be slow on virtual time and be killed at any effect. A process that is killed goes on running for a moment,
as programs in programs do, but nothing that it does has an effect any more.
"""

from __future__ import annotations

import queue
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio

from lightning_bus import messages as m
from lightning_bus.broker import core
from lightning_bus.broker import server as server_module
from lightning_bus.config import BrokerSection
from lightning_bus.errors import StorageError, first_error
from lightning_bus.records import Record, Write
from tests.simulation.disk import Disk, Killed, OpenLog
from tests.simulation.network import Network, RouterChannel
from tests.simulation.oracle import Oracle

SECRET = b"s" * 32
LEASE_S = 4.0
MAX_ATTEMPTS = 4
SAME_EVERY = 8  # transactions between comparisons of memory and disk


class Brokers:
    """A broker, and when it is gone the next one."""

    def __init__(
        self, chance: random.Random, oracle: Oracle, network: Network, disk: Disk, count: Callable[[str], None],
        *, dies: dict[str, float], look_inside: bool,
    ) -> None:  # fmt: skip
        self.oracle = oracle
        self.count = count
        self.calm = False  # nobody kills it any more
        self._chance = chance
        self._network = network
        self._disk = disk
        self._dies = dies
        self._look_inside = look_inside
        self._scope: anyio.CancelScope | None = None
        self._log: OpenLog | None = None
        self._router: RouterChannel | None = None
        self._state: core.BrokerState | None = None  # of the one that lives or lived last
        self._killed = False

    async def serve_for_ever(self) -> None:
        section = BrokerSection(lease_s=LEASE_S, max_attempts=MAX_ATTEMPTS)
        while True:
            await anyio.sleep(0.0 if self.calm else self._chance.expovariate(1.0))
            self._killed = False
            try:
                with anyio.CancelScope() as self._scope:
                    await server_module.serve_broker(section, Path(), SECRET, started=lambda _: self.count("brokers"))
                if not self._killed:
                    self._compare_with_disk()  # it was asked to stop: all that it had decided is written
            except* (Killed, StorageError) as group:
                self.count(f"broker ended: {type(first_error(group)).__name__}")
            self._scope = None

    def kill(self) -> None:
        """SIGKILL."""
        if self._scope is not None:
            self._killed = True
            if self._log is not None:
                self._log.dead = True
            if self._router is not None:
                self._router.close()
            self._scope.cancel()

    def stop(self) -> None:
        """SIGTERM."""
        if self._scope is not None:
            self._scope.cancel()

    def may_die(self, moment: str) -> None:
        """Here the broker may be killed."""
        if not self.calm and self._chance.random() < self._dies.get(moment, 0.0):
            self.count(f"killed: {moment}")
            self.kill()
            raise Killed

    # -- what the real code finds in place of its own

    def open_log(self, path: Path, **_: object) -> OpenLog:
        self._log = OpenLog(self._disk)
        return self._log

    def bind(self, address: str) -> tuple[RouterChannel, str]:
        self._router = self._network.bind()
        return self._router, address

    # -- what the oracle is shown

    def started(self, state: core.BrokerState) -> None:
        """A broker has opened the log."""
        self._state = state
        if self._look_inside:
            self.oracle.restored(state)

    def settled(self) -> None:
        """The broker has nothing under way."""
        if self._look_inside and self._state is not None:
            self.oracle.consistent(self._state)
            if self._disk.transactions % SAME_EVERY == 0:
                self._compare_with_disk()

    def restored(self) -> core.BrokerState:
        """What a broker that opened the log now would know."""
        return core.restore(self._disk.snapshot(), secret=SECRET, lease_s=LEASE_S, max_attempts=MAX_ATTEMPTS, now_s=0.0)

    def _compare_with_disk(self) -> None:
        if self._look_inside and self._state is not None:
            self.oracle.same(self._state, self.restored())


class SimulatedServer(server_module.BrokerServer):
    """The broker's loop with a committer that does what `BrokerServer._commit_groups` does in its thread."""

    brokers: Brokers  # whose next broker this is

    def __init__(self, state: core.BrokerState, log: Any, channel: Any) -> None:
        super().__init__(state, log, channel)
        self._queue = self._decided = _Decided()
        self.brokers.started(state)

    async def _commit_in_thread(self) -> None:
        # A thread is not cancelled either: what was decided when the broker is asked to stop is still written.
        with anyio.CancelScope(shield=True):
            while await self._commit_group():
                pass

    async def _commit_group(self) -> bool:
        """Take what is queued, one transaction, then the replies. False when that was the last."""
        await self._decided.wait_filled()
        group: list[core.Effects] = []
        size, ending = 0, False
        while size < server_module.GROUP_BYTES_MAX and not ending:
            try:
                item = self._queue.get_nowait()
            except queue.Empty:
                break
            if item is None:
                ending = True
            else:
                group.append(item[0])
                size += item[1]
        writes = [write for effects in group for write in effects.writes]
        await self.commit(writes)
        sends = [send for effects in group for send in effects.sends]
        self._on_durable(sends, max((w.offset + 1 for w in writes if isinstance(w, Record)), default=0), size)
        if self._queue.empty() and not ending:
            self.brokers.settled()
        return not ending

    async def commit(self, writes: list[Write]) -> None:
        if writes:
            self.brokers.may_die("before commit")
            log: Any = self._log
            await log.commit(writes)
            self.brokers.may_die("after commit")

    def _decide(self, effects: core.Effects, size: int) -> None:
        super()._decide(effects, size)
        if effects.writes:
            self.brokers.may_die("decided")

    def _send(self, identity: bytes, send: core.Send, blobs: list[bytes] | None = None) -> None:
        self.brokers.may_die("between replies")
        channel: Any = self._channel
        if isinstance(send.body, m.Task) and not channel.dead:
            self.brokers.oracle.sent_task(send.peer, send.body)
        super()._send(identity, send, blobs)


class _Decided(queue.SimpleQueue[tuple[core.Effects, int] | None]):
    """The queue to the committer. The standard library's wakes threads; this one wakes a task."""

    def __init__(self) -> None:
        self._filled = anyio.Event()

    def put(self, item: tuple[core.Effects, int] | None, block: bool = True, timeout: float | None = None) -> None:
        super().put(item)
        self._filled.set()

    async def wait_filled(self) -> None:
        while self.empty():
            self._filled = anyio.Event()
            await self._filled.wait()
