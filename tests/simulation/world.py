"""A bus in a box: the real broker and the real clients on virtual time, a network and a disk that do harm, one seed.

    seed ──► which harm, how much ──► chaos ──► calm ──► everything submitted has ended exactly once, and the books balance

Verified, by `oracle.Oracle`, at every transaction and every answer: the promises of the design, section 4, under
lost, late, repeated and damaged messages, cut, silent and stalled connections, brokers killed at any effect or asked
to stop, workers and other clients killed, transactions that fail (landed or not) or take long, and a wall clock that
jumps. Real are `broker.core`, `broker.server` (but for its committer thread), `leases`, `client`, `wire`, `log.codec`,
`log.verify`.

Not verified: the committer thread itself and LMDB (tests/crash; a transaction is atomic here by construction), ZeroMQ
and `transport`, damaged headers (the checksum does not cover them), clocks of several machines that drift apart, more
than one reader a cursor, messages near the size limits, tens of thousands of rollouts. What stops a real process,
such as a peer that breaks the protocol, here ends that client and starts another.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from unittest import mock

import anyio

from lightning_bus import wire
from lightning_bus.broker import server as server_module
from lightning_bus.client import Client
from lightning_bus.client import session as session_module
from lightning_bus.errors import LightningBusError
from lightning_bus.log.verify import verify_log
from lightning_bus.records import Record, Write
from tests.simulation.brokers import LEASE_S, MAX_ATTEMPTS, Brokers, SimulatedServer
from tests.simulation.clients import ADDRESS, Clients
from tests.simulation.disk import Disk, DiskHealth, DiskReader
from tests.simulation.faults import draw_faults
from tests.simulation.network import Link, Network
from tests.simulation.oracle import Oracle, Violation
from tests.simulation.virtual_time import START_S, VirtualLoop, run, virtual_loop

TICK_S = 0.25  # the real 0.1 s costs time and shows nothing more,
CONNECT_S = 0.2  # nor does knocking fifty times a second
CHAOS_S = 24.0  # mean
CALM_S = 240.0  # what is left when harm ends must end within this: a bound, generously above the seconds it takes
MESSAGES_MAX = 60_000  # a history of a few hundred that gets here goes round in circles
Note = Callable[[str], None]


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
        self.oracle = Oracle(MAX_ATTEMPTS)
        self.network = Network(loop, self.chance, self.faults.weather, self._note_message if note else None)
        self.disk = Disk(self.chance, self.faults.disk, self._on_commit)
        self.brokers = Brokers(
            self.chance, self.oracle, self.network, self.disk, self.count,
            dies=self.faults.broker_dies, look_inside=look_inside,
        )  # fmt: skip
        self.clients = Clients(self.chance, self.oracle, self.network, self.count)
        self._note = note
        self._look_inside = look_inside

    async def play(self) -> None:
        """The whole history."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self.brokers.serve_for_ever)
            self.clients.start(tasks)
            await self._chaos()
            self._calm()
            await self._everything_ends()
            await self._books_balance()
            tasks.cancel_scope.cancel()
        self._log_tells_the_same()

    def outcome(self) -> Outcome:
        fingerprint = zlib.crc32(repr((self.loop.time(), self.chance.random())).encode())
        for value in self.disk.values:
            fingerprint = zlib.crc32(value, fingerprint)
        return Outcome(
            self.seed, fingerprint, self.loop.time() - START_S, self.network.messages, self.disk.transactions,
            len(self.disk.values), dict(sorted(self.events.items())),
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
                (server_module, "TICK_S", TICK_S),
                (server_module, "BrokerServer", server),
                (server_module, "LogWriter", self.brokers.open_log),
                (server_module, "bind_router", self.brokers.bind),
            ):
                patches.enter_context(mock.patch.object(module, name, value))
            yield

    # What the client asks of the standard library's `secrets`.

    def token_hex(self, count: int) -> str:
        return self.chance.randbytes(count).hex()

    def token_bytes(self, count: int) -> bytes:
        return self.chance.randbytes(count)

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
            "kill broker": self.brokers.kill,
            "stop broker": self.brokers.stop,
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
        self.loop.wall_shift_ns += int(self.chance.uniform(-3600, 3600) * 1e9)

    def _calm(self) -> None:
        self.brokers.calm = self.clients.calm = True
        self.network.heal()
        self.disk.health = DiskHealth()
        self._say("all harm ends here")

    # -- the end

    async def _everything_ends(self) -> None:
        """Liveness: with the harm gone, every rollout ends, and nobody goes on holding what is over."""
        until_s = anyio.current_time() + CALM_S
        planned = set(self.clients.planned)
        while self.clients.accepted != planned or self.oracle.unfinished or self.clients.held():
            if anyio.current_time() > until_s:
                raise Violation(
                    f"everything ends within {CALM_S:g} s of calm: not submitted {planned - self.clients.accepted}, not "
                    f"ended {[(i, self.oracle.lives[i]) for i in self.oracle.unfinished]}, held {self.clients.held()}"
                )
            if self.network.messages > MESSAGES_MAX:
                raise Violation(f"everything ends: {self.network.messages} messages for {len(planned)} rollouts")
            await anyio.sleep(0.5)

    async def _books_balance(self) -> None:
        """A client that comes now is told what the ledger says."""
        async with Client(ADDRESS, role="auditor") as bus:
            status = await bus.status()
            rollouts = await bus.query()
        self.oracle.counted(status)
        self.oracle.seen(rollouts)
        ended = [life.status for life in self.oracle.lives.values()]
        told = {name: count for name, count in status.rollouts.items() if count}
        if told != {name: ended.count(name) for name in ended}:
            raise Violation(f"counts add up: told {status.rollouts}, ended {ended}")
        planned = len(self.clients.planned)
        if len(rollouts) != planned or status.held:
            raise Violation(f"each rollout is there once: {len(rollouts)} for {planned}, held {status.held}")

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
                    self._say(f"  disk {write.table.value} {_short(write.key)} = {_short(write.value)}")
        self.oracle.committed(writes)

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


def _root(exc: BaseException) -> BaseException:
    """What is behind a group of errors: the first broken promise, else the first error."""
    if not isinstance(exc, BaseExceptionGroup):
        return exc
    roots = [_root(inner) for inner in exc.exceptions]
    return next((root for root in roots if isinstance(root, Violation)), roots[0])


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 160 else f"{text[:157]}…"
