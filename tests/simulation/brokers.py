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
from tests.simulation.virtual_time import Bell, VirtualLoop, process

PROCESS = "broker"
SECRET = b"s" * 32
LEASE_S = 4.0
MAX_ATTEMPTS = 4
LOOK_EVERY = 16  # transactions between looks at its memory


class Brokers:
    """A broker, and when it is gone the next one."""

    def __init__(
        self, chance: random.Random, oracle: Oracle, network: Network, disk: Disk, loop: VirtualLoop,
        section: BrokerSection, count: Callable[[str], None], *, dies: dict[str, float], look_inside: bool,
    ) -> None:  # fmt: skip
        self.oracle = oracle
        self.count = count
        self.calm = False  # nobody kills it any more
        self._chance = chance
        self._network = network
        self._disk = disk
        self._loop = loop
        self._section = section
        self._dies = dies
        self._look_inside = look_inside
        self._scope: anyio.CancelScope | None = None
        self._log: OpenLog | None = None
        self._router: RouterChannel | None = None
        self._state: core.BrokerState | None = None  # of the one that lives or lived last
        self.killed = False
        self._server: SimulatedServer | None = None
        self._paused = False

    async def serve_for_ever(self) -> None:
        process.set(PROCESS)
        while True:
            await anyio.sleep(0.0 if self.calm else self._chance.uniform(0.0, 2.0))
            self.killed = False
            try:
                with anyio.CancelScope() as self._scope:
                    await server_module.serve_broker(self._section, Path(), SECRET, started=self._count_broker)
                if not self.killed:
                    self._compare_with_disk()  # it was asked to stop: all that it had decided is written
            except* (Killed, StorageError) as group:
                self.count(f"broker ended: {type(first_error(group)).__name__}")
            self._scope = self._server = None

    def kill(self) -> None:
        """SIGKILL."""
        if self._scope is not None:
            self.go_on()
            self.killed = True
            if self._log is not None:
                self._log.dead = True
            if self._router is not None:
                self._router.close()
            self._scope.cancel()
            if self._server is not None:
                self._server.abort()

    def stop(self) -> None:
        """SIGTERM. One that is paused hears of it when it goes on."""
        if self._scope is not None:
            self.go_on()
            self._scope.cancel()

    def pause(self) -> None:
        """SIGSTOP, for longer than a lease or not."""
        if not self._paused:
            self._paused = True
            self._loop.pause(PROCESS)
            self._loop.call_later(self._chance.uniform(0.5, 2 * LEASE_S), self.go_on)

    def go_on(self) -> None:
        """SIGCONT."""
        if self._paused:
            self._paused = False
            self._loop.go_on(PROCESS)

    def revoke_one(self) -> None:
        """A worker's key is revoked, and what it held goes to others. (It gets another key at once and goes on.)"""
        if self._server is None or self._state is None or self.killed or self._paused:
            return
        workers = sorted(self._state.table.workers)
        if workers:
            worker = self._chance.choice(workers)
            self.oracle.disk.revoked.add(worker)
            self._server.revoke(worker, self._loop.time(), self._loop.time_ns())

    def heal(self) -> None:
        """Calm: nobody kills it any more."""
        self.calm = True
        self.go_on()

    def may_die(self, moment: str) -> None:
        """Here the broker may be killed."""
        if self._dies_now(moment):
            raise Killed

    def _dies_now(self, moment: str) -> bool:
        if self.calm or self._chance.random() >= self._dies.get(moment, 0.0):
            return False
        self.count(f"killed: {moment}")
        self.kill()
        return True

    def _count_broker(self, address: str) -> None:
        self.count("brokers")

    # -- what the real code finds in place of its own

    def open_log(self, path: Path, **_: object) -> OpenLog:
        self._log = OpenLog(self._disk)
        return self._log

    def bind(self, address: str, keyring: object = None) -> tuple[RouterChannel, str]:
        self._router = self._network.bind(lambda: self._dies_now("between replies") and None)
        return self._router, address

    # -- what the oracle is shown

    def started(self, server: SimulatedServer, state: core.BrokerState) -> None:
        """A broker has opened the log."""
        self._server = server
        self._state = state
        disk = self.oracle.disk
        disk.broker += 1
        disk.brokers_s[disk.broker] = self._loop.time()
        if self._look_inside:
            self.oracle.restored(state)

    def settled(self) -> None:
        """The broker has nothing under way."""
        looks = self._look_inside and not self.killed and self._disk.transactions % LOOK_EVERY == 0
        if looks and self._state is not None:
            self.oracle.consistent(self._state)
            self._compare_with_disk()

    def quiet(self, *, delayed: int) -> None:
        """Everybody has been gone for long; so many rollouts wait for their time."""
        if self._state is not None:
            self.oracle.quiet(self._state, delayed)

    def restored(self) -> core.BrokerState:
        """What a broker that opened the log now would know."""
        return core.restore(
            self._disk.log.load(), secret=SECRET, lease_s=LEASE_S, max_attempts=MAX_ATTEMPTS, now_s=self._loop.time(),
            wall_ns=self._loop.time_ns(),
        )  # fmt: skip

    def _compare_with_disk(self) -> None:
        if self._look_inside and self._state is not None:
            self.oracle.same(self._state, self.restored())


class SimulatedServer(server_module.BrokerServer):
    """The broker's loop with a committer that does what `BrokerServer._commit_groups` does in its thread."""

    brokers: Brokers  # whose next broker this is

    def __init__(self, state: core.BrokerState, *given: Any) -> None:
        super().__init__(state, *given)
        self._queue = self._decided = _Decided()
        self.brokers.started(self, state)

    def abort(self) -> None:
        """It was killed, so it drains nothing."""
        self._loops.cancel()

    def revoke(self, peer: str, now_s: float, wall_ns: int) -> None:
        """Do what `housekeeping.cut_off_revoked` does, while it runs."""
        if self._loops.cancel_called:
            return
        try:
            self._decide_unasked(core.drop_peer(self._state, peer, now_s, wall_ns))
        except Killed:
            pass  # of this decision

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

    def _send(self, identity: bytes, send: core.Send, blobs: list[bytes] | None = None) -> bool:
        channel: Any = self._channel
        if isinstance(send.body, m.Task) and not channel.dead:
            self.brokers.oracle.sent_task(send.peer, send.body)
        return super()._send(identity, send, blobs)


class _Decided(queue.SimpleQueue[tuple[core.Effects, int] | None]):
    """The queue to the committer. The standard library's wakes threads; this one wakes a task."""

    def __init__(self) -> None:
        self._filled = Bell()

    def put(self, item: tuple[core.Effects, int] | None, block: bool = True, timeout: float | None = None) -> None:
        super().put(item)
        self._filled.ring()

    async def wait_filled(self) -> None:
        while self.empty():
            await self._filled.wait()
