"""A bus in a box: the real broker and the real clients on virtual time, a network and a disk that do harm, one seed.

    seed ──► which harm, how much ──► chaos ──► calm ──► everything submitted has ended exactly once, and the books balance

Verified, by `ledger.Ledger` and `oracle.Oracle`, at every transaction and every answer: the promises of the design,
section 4, and those of docs/protocol.md about priorities, delays, time limits, keys, waiting, watching, draining, dead
letters and retention, under lost, late, repeated and damaged messages and bundles, cut, silent and stalled connections,
brokers killed at any effect, paused or asked to stop, workers and other clients killed or paused, revoked keys,
transactions that fail (landed or not) or take long, and a wall clock that jumps. Real are all of `broker` (but for its
committer thread), `client` and `workers.runtime`, `leases`, `wire`, `log.codec`, `log.retention`, `log.verify`; the log
is `log.memory`.

Not verified: the committer thread itself and LMDB (tests/crash; a transaction and a drop are atomic here by
construction), ZeroMQ and `transport`, damaged headers (the checksum does not cover them), clocks of several machines
that drift apart, more than one reader a cursor, messages near the size limits, a full queue or a full window, tens of
thousands of rollouts. What stops a real process, such as a peer that breaks the protocol, here ends that client and
starts another.
"""

from __future__ import annotations

import logging
import random
import zlib
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar
from unittest import mock

import anyio
import anyio.to_thread

from lightning_bus import messages as m
from lightning_bus import wire
from lightning_bus.broker import server as server_module
from lightning_bus.client import Client
from lightning_bus.client import session as session_module
from lightning_bus.client import spool as spool_module
from lightning_bus.config import BrokerSection
from lightning_bus.errors import LightningBusError
from lightning_bus.log.verify import verify_log
from lightning_bus.records import Put, Record, Write
from lightning_bus.resources import Resource
from tests.simulation.brokers import LEASE_S, MAX_ATTEMPTS, Brokers, SimulatedServer
from tests.simulation.clients import ADDRESS, Clients
from tests.simulation.disk import SEGMENT_BYTES, Disk, DiskReader
from tests.simulation.faults import draw_faults
from tests.simulation.ledger import Violation
from tests.simulation.network import Link, Network
from tests.simulation.oracle import Oracle
from tests.simulation.users import processes
from tests.simulation.virtual_time import START_S, WALL_STEP_NS, VirtualLoop, run, virtual_loop
from tests.simulation.workload import draw_workload
from workers import runtime as worker_module

TICK_S = 0.25  # the real 0.1 s costs time and shows nothing more,
CONNECT_S = 0.2  # nor does knocking fifty times a second
CHAOS_S = 20.0  # mean
QUIET_EVERY = 4  # seeds between those in which is waited until everybody is forgotten,
QUIET_S = 70.0  # which takes this long: the longest WAIT
CHUNK_BYTES = 70  # of a span, about: so that batches are many, and several under way
WAITED_S = 30.0  # after the last end, whoever waits has been told: a WAIT is renewed well within this
CALM_S = 240.0  # what is left when harm ends must end within this: a bound, generously above the seconds it takes
MESSAGES_MAX = 60_000  # a history of a few hundred that gets here goes round in circles
Note = Callable[[str], None]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a history came to. Every time that a seed is played it is the same."""

    seed: int
    fingerprint: int  # of the log, the time it took and the dice
    seconds: float  # virtual
    messages: int
    transactions: int
    records: int
    events: dict[str, int]  # how often each harm was done, and what became of things


def simulate(
    seed: int, *, note: Note | None = None, server: type[SimulatedServer] | None = None, look_inside: bool = True
) -> Outcome:
    """Play one history. Raises Violation, naming the seed, when a promise is broken or anything falls over.

    `note` hears each event of the history. `server` is the broker's loop, for bugs planted in it. Without
    `look_inside` only the log and what clients were told are watched, not the broker's memory.
    """
    with virtual_loop() as loop:
        world = World(seed, loop, note, look_inside)
        with world.in_place_of_the_real(server or SimulatedServer):
            try:
                run(loop, world.play)
            except BaseException as exc:
                cause = _root(exc)
                if isinstance(cause, KeyboardInterrupt | SystemExit):
                    raise
                told = str(cause) if isinstance(cause, Violation) else f"{type(cause).__name__}: {cause}"
                raise Violation(
                    f"seed {seed}, {loop.time() - START_S:.3f} s: {told}\n"
                    f"see its history: python -m tests.simulation.run --seed {seed} -v"
                ) from cause
        return world.outcome()


class World:
    """Everything there is in one history."""

    def __init__(self, seed: int, loop: VirtualLoop, note: Note | None, look_inside: bool) -> None:
        self.seed = seed
        self.loop = loop
        self.chance = random.Random(seed)
        self.faults = draw_faults(self.chance)
        self.events: dict[str, int] = {}
        self.work = draw_workload(self.chance)
        self.oracle = Oracle(MAX_ATTEMPTS, LEASE_S, loop.time)
        self.oracle.disk.weighed = not self.work.task_bytes_max
        self.network = Network(loop, self.chance, self.faults.weather, self._note_message if note else None)
        self.network.keys = self.work.keys
        self.disk = Disk(self.chance, self.faults.disk, self._on_commit, self.oracle.dropping)
        self.brokers = Brokers(
            self.chance, self.oracle, self.network, self.disk, loop, self._section(), self.count,
            dies=self.faults.broker_dies, look_inside=look_inside,
        )  # fmt: skip
        self.clients = Clients(self.chance, self.oracle, self.network, loop, self.work, self.count)
        self._note = note
        self._look_inside = look_inside

    async def play(self) -> None:
        """The whole history."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self.brokers.serve_for_ever)
            async with anyio.create_task_group() as users:
                self.clients.start(users, processes(self.clients))
                try:
                    await self._chaos()
                finally:
                    self._calm()  # also when this is the end: who is paused could not be ended
                await self._everything_ends()
                await self._books_balance()
                if self.work.watcher:
                    await self._who_watches_is_told()
                    await self._everything_ends()  # a copy of an old REPLAY came meanwhile (seed 13891)
                users.cancel_scope.cancel()
            if self.seed % QUIET_EVERY == 0:
                await self._everybody_is_forgotten()
            tasks.cancel_scope.cancel()
        self._log_tells_the_same()
        self.oracle.conclude()

    def outcome(self) -> Outcome:
        fingerprint = zlib.crc32(repr((self.loop.time(), self.chance.random())).encode())
        fingerprint = zlib.crc32(b"%d" % self.disk.fingerprint, fingerprint)
        return Outcome(
            self.seed, fingerprint, self.loop.time() - START_S, self.network.messages, self.disk.transactions,
            self.disk.log.end_offset, dict(sorted(self.events.items())),
        )  # fmt: skip

    @contextmanager
    def in_place_of_the_real(self, server: type[SimulatedServer]) -> Generator[None]:
        """The bus's own code finds this world where it expects sockets, a disk and dice."""
        server.brokers = self.brokers
        with ExitStack() as patches:
            for module, name, value in (
                (session_module, "connect_dealer", self.network.connect),
                (session_module, "secrets", self),
                (session_module, "CONNECT_S", CONNECT_S),
                (spool_module, "FULL_BYTES", 1 if self.work.pipelines else spool_module.FULL_BYTES),
                (spool_module, "BATCH_BYTES_MAX", 2 * CHUNK_BYTES if self.work.pipelines else 1 << 20),
                (worker_module, "os", self),
                (anyio.to_thread, "run_sync", _run_here),
                (logging.getLogger("workers"), "disabled", True),
                (logging.getLogger("lightning_bus.broker"), "disabled", True),
                (server_module, "TICK_S", TICK_S),
                (server_module, "BrokerServer", server),
                (server_module, "LogWriter", self.brokers.open_log),
                (server_module, "bind_router", self.brokers.bind),
            ):
                patches.enter_context(mock.patch.object(module, name, value))
            yield

    # What the client asks of the standard library's `secrets`, and the worker of its `os`.

    def token_hex(self, count: int) -> str:
        return self.chance.randbytes(count).hex()

    def token_bytes(self, count: int) -> bytes:
        return self.chance.randbytes(count)

    def urandom(self, count: int) -> bytes:
        return self.chance.randbytes(count)

    def _section(self) -> BrokerSection:
        retention = self.work.retention
        return BrokerSection(
            lease_s=LEASE_S, max_attempts=MAX_ATTEMPTS, drain_s=self.chance.choice([0.0, 2.0, 10.0]),
            drop_read=retention == "read", retain_s=5.0 if retention == "age" else 0.0,
            retain_bytes=2 * SEGMENT_BYTES if retention == "bytes" else 0,
        )  # fmt: skip

    # -- harm

    async def _chaos(self) -> None:
        with anyio.move_on_after(self.chance.uniform(0.5, 1.5) * CHAOS_S):
            async with anyio.create_task_group() as events:
                for name, every_s in self.faults.every_s.items():
                    events.start_soon(self._happens, name, every_s)
                await anyio.sleep_forever()

    async def _happens(self, name: str, every_s: float) -> None:
        event: dict[str, Callable[[], None]] = {
            "kill client": self.clients.kill_one,
            "pause client": self.clients.pause_one,
            "kill broker": self.brokers.kill,
            "stop broker": self.brokers.stop,
            "pause broker": self.brokers.pause,
            "revoke": self.brokers.revoke_one,
            "cut": lambda: self._to_a_link(self.network.cut),
            "silence": lambda: self._to_a_link(self._silence),
            "stall": lambda: self._to_a_link(self._stall),
            "move wall clock": self._move_wall_clock,
        }
        while True:
            await anyio.sleep(self.chance.expovariate(1.0 / every_s))
            self.count(name)
            event[name]()

    def _to_a_link(self, do: Callable[[Link], None]) -> None:
        living = [link for link in self.network.links.values() if not link.client.dead]
        if living:
            do(self.chance.choice(living))

    def _silence(self, link: Link) -> None:
        """One direction, or both: nobody is told."""
        if self.chance.random() < 0.7:
            link.silent.add("up")
        if not link.silent or self.chance.random() < 0.5:
            link.silent.add("down")
        self.loop.call_later(self.chance.uniform(0.5, 2.5 * LEASE_S), link.silent.clear)

    def _stall(self, link: Link) -> None:
        """A client that is suspended, or a switch that thinks: what is sent arrives, much later and all at once."""
        link.stalled_until_s = self.loop.time() + self.chance.uniform(0.5, 2.5 * LEASE_S)

    def _move_wall_clock(self) -> None:
        self.loop.wall_shift_ns += self.chance.choice([-3, -2, -1, 1, 2, 3]) * WALL_STEP_NS
        self.oracle.disk.wall_moved_s.append(self.loop.time())

    def _calm(self) -> None:
        self.network.heal()
        self.brokers.heal()
        self.clients.heal()
        self.disk.heal()
        self._say("all harm ends here")

    # -- the end

    async def _everything_ends(self) -> None:
        """Liveness: with the harm gone, every rollout ends, who waits is told, and nobody goes on holding what is over."""
        calm_s = self.loop.time()
        planned = {plan.name for plan in self.work.plans}
        disk, clients = self.oracle.disk, self.clients
        while clients.accepted.keys() != planned or disk.unfinished or clients.held():
            self.oracle.on_time(calm_s)
            if self.loop.time() > calm_s + CALM_S:
                raise Violation(
                    f"everything ends within {CALM_S:g} s of calm: not submitted {planned - clients.accepted.keys()}, "
                    f"not ended {[(i, disk.lives[i]) for i in disk.unfinished]}, held {clients.held()}"
                )
            if self.network.messages > MESSAGES_MAX:
                raise Violation(f"everything ends: {self.network.messages} messages for {len(planned)} rollouts")
            await anyio.sleep(0.5)
        await self._who_waits_is_told()

    async def _who_waits_is_told(self) -> None:
        until_s = self.loop.time() + WAITED_S
        while self.clients.waiting:
            if self.loop.time() > until_s:
                raise Violation(f"who waits is told in the end: {sorted(self.clients.waiting)} were not")
            await anyio.sleep(0.5)

    async def _books_balance(self) -> None:
        """A client that comes now is told what the ledger says."""
        disk = self.oracle.disk
        async with Client(ADDRESS, role="auditor") as bus:
            while True:
                status = await bus.status()
                rollouts = await bus.query()
                if status.next_offset == disk.end_offset and not disk.unfinished:
                    break
                await self._everything_ends()  # a copy of some old request came late
        self.oracle.counted(status)
        self.oracle.seen(rollouts)
        ended = [life.status for life in self.oracle.disk.lives.values()]
        told = {name: count for name, count in status.rollouts.items() if count}
        if told != {name: ended.count(name) for name in ended}:
            raise Violation(f"counts add up: told {status.rollouts}, ended {ended}")
        known = len(self.oracle.disk.lives)
        if len(rollouts) != known or status.held:
            raise Violation(f"each rollout is there once: {len(rollouts)} for {known}, held {status.held}")

    async def _who_watches_is_told(self) -> None:
        """A new version reaches who waits for it."""
        async with Client(ADDRESS, role="auditor") as bus, anyio.create_task_group() as asking:

            async def watch(asked_s: float) -> None:
                self.oracle.watched(await anext(bus.watch("signal", wait_s=20.0)), -1, asked_s)

            asking.start_soon(watch, self.loop.time())
            await anyio.sleep(0.5)
            await bus.put(Resource("signal", 0, b""))

    async def _everybody_is_forgotten(self) -> None:
        """Somebody waits for what will not come, and goes; long after that the broker remembers nobody."""
        far = m.Submission("far", b"", delay_s=1e6)
        async with Client(ADDRESS, role="auditor") as bus:
            await bus.submit([far])
            with anyio.move_on_after(1.0):
                async with anyio.create_task_group() as asking:
                    asking.start_soon(bus.wait, [far.rollout_id])
                    asking.start_soon(anext, bus.watch("nothing", wait_s=60.0))
                    await anyio.sleep_forever()
        await anyio.sleep(QUIET_S)
        self.brokers.quiet(delayed=1)
        async with Client(ADDRESS, role="auditor") as bus:
            # With others that a late copy of a SUBMIT has brought back, which retention had forgotten.
            await bus.cancel(list(self.oracle.disk.unfinished))

    def _log_tells_the_same(self) -> None:
        """`lightning-bus verify` has its own idea of what a log must look like; the two must agree."""
        for check in verify_log(DiskReader(self.disk)).checks:
            if not check.proved:
                raise Violation(f"verify agrees: {check.promise}: {check.first}")
        if self._look_inside:
            self.oracle.restored(self.brokers.restored())

    # -- what is told

    def count(self, event: str) -> None:
        """Something happened that is worth a number."""
        self.events[event] = self.events.get(event, 0) + 1
        self._say(event)

    def _on_commit(self, writes: Sequence[Write]) -> None:
        if self._note is not None:
            for write in writes:
                if isinstance(write, Record):
                    scope = f"{write.producer} {write.epoch}:{write.seq} {write.rollout_id} {write.attempt}"
                    self._say(f"  disk {write.offset}: {write.kind.name} {scope} {_short(write.body)}")
                else:
                    told = f"= {_short(write.value)}" if isinstance(write, Put) else "forgotten"
                    self._say(f"  disk {write.table.value} {_short(write.key)} {told}")
        self.oracle.disk.committed(writes, self.loop.time())

    def _note_message(self, how: str, direction: str, identity: str, frames: list[bytes]) -> None:
        arrow = "──►" if direction == "up" else "◄──"
        try:
            header, body, _ = wire.decode(frames)
        except LightningBusError as exc:
            self._say(f"{identity} {arrow} {how} damaged: {exc}")
        else:
            self._say(f"{identity} {arrow} {how} {header.request} {header.epoch}:{header.seq} {_short(body)}")

    def _say(self, text: str) -> None:
        if self._note is not None:
            self._note(f"{self.loop.time() - START_S:9.3f}  {text}")


async def _run_here(function: Callable[..., T], *given: Any, **_: object) -> T:
    """There are no threads on virtual time."""
    await anyio.sleep(0.0)
    return function(*given)


def _root(exc: BaseException) -> BaseException:
    """What is behind a group of errors: the first broken promise, else the first error."""
    if not isinstance(exc, BaseExceptionGroup):
        return exc
    roots = [_root(inner) for inner in exc.exceptions]
    return next((root for root in roots if isinstance(root, Violation)), roots[0])


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 160 else f"{text[:157]}…"
