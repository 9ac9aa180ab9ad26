"""Who uses the bus: workers and their agents, the gateway, the trainer, a reader. Each is a process of its own.

They are honest and use the real client; what they are told they tell the oracle. A process is killed now and then, or
ended by an error that it must not go on after, and is started again with nothing remembered but what the trainer knows
to be submitted.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable

import anyio
from anyio.abc import TaskGroup

from lightning_bus import messages as m
from lightning_bus.client import Client, Leases
from lightning_bus.errors import BrokenError, FencedError, LightningBusError, first_error
from lightning_bus.resources import Resource
from lightning_bus.spans import Span, encode_spans
from tests.simulation.brokers import LEASE_S
from tests.simulation.network import Network
from tests.simulation.oracle import Oracle, Violation, is_session_over

ADDRESS = "sim://broker"


class Clients:
    """All client processes of a history."""

    def __init__(self, chance: random.Random, oracle: Oracle, network: Network, count: Callable[[str], None]) -> None:
        self.chance = chance
        self.oracle = oracle
        self.count = count
        self.calm = False  # then nobody dawdles, fails or asks for more than to be done
        self.planned = [f"{chance.choice('abc')}-{i}" for i in range(chance.randint(3, 12))]
        self.accepted: set[str] = set()  # of those planned, submitted for sure
        self._network = network
        self._chunks = 0
        self._scopes: dict[str, anyio.CancelScope] = {}  # by process
        self._sessions: dict[str, str] = {}  # by process
        self._leases: dict[str, Leases] = {}  # by process
        self._gateway: Client | None = None

    def start(self, tasks: TaskGroup) -> None:
        """Start every process; they live until the tasks are cancelled."""
        for name in [f"worker-{i}" for i in range(self.chance.randint(1, 3))]:
            tasks.start_soon(self._lives, name, self._live_as_worker)
        tasks.start_soon(self._lives, "gateway", self._live_as_gateway)
        tasks.start_soon(self._lives, "trainer", self._live_as_trainer)
        tasks.start_soon(self._lives, "reader", self._live_as_reader)

    def kill_one(self) -> None:
        """SIGKILL: it says nothing more."""
        name = self.chance.choice(sorted(self._scopes))
        link = self._network.links.get(self._sessions.get(name, ""))
        if link is not None:
            link.client.close()
        self._scopes[name].cancel()

    def held(self) -> dict[str, int]:
        """How many attempts each worker believes to hold."""
        return {name: leases.held for name, leases in self._leases.items() if leases.held}

    async def _lives(self, name: str, live: Callable[[str], Awaitable[None]]) -> None:
        """A client process: killed now and then, or ended by an error that it may not go on after, and started again."""
        while True:
            with anyio.CancelScope() as self._scopes[name]:
                try:
                    await live(name)
                except* LightningBusError as group:
                    self.count(f"{name.partition('-')[0]} ended: {type(first_error(group)).__name__}")
            self._leases.pop(name, None)
            await anyio.sleep(self.chance.uniform(0.1, 2.0))

    async def _live_as_worker(self, name: str) -> None:
        async with self._client(name, "worker") as bus:
            slots = self.chance.randint(1, 3)
            async with bus.lease(slots) as leases, anyio.create_task_group() as attempts:
                self._leases[name] = leases
                if self.chance.random() < 0.2:
                    attempts.start_soon(self._retire, leases)
                async for task in leases:
                    attempts.start_soon(self._carry_out, bus, leases, task)

    async def _retire(self, leases: Leases) -> None:
        """SIGTERM: take no more, end what runs."""
        await anyio.sleep(self.chance.uniform(1.0, 15.0))
        leases.stop()

    async def _carry_out(self, bus: Client, leases: Leases, task: m.Task) -> None:
        """An agent: a few model calls through the gateway, spans of its worker's own, then a result."""
        scope = anyio.CancelScope()
        leases.on_lost(task, scope.cancel)
        chance = self.chance
        with scope:
            for _ in range(chance.randint(0, 3)):
                await anyio.sleep(
                    0.1 if self.calm else chance.expovariate(1.0 / chance.choice([0.2, 0.2, 1.0, LEASE_S]))
                )
                producer = self._gateway if chance.random() < 0.7 else bus
                if producer is not None:
                    await self._append(producer, task.rollout_id, task.attempt)
        if scope.cancelled_caught:
            self.count("lost")
            return
        what = chance.choices(["done", "fail", "final"], [8, 0 if self.calm else 2, 1])[0]
        spans = [self._span(task.rollout_id, task.attempt)]
        chunk = encode_spans(spans)
        self.oracle.reporting(bus.session, task.rollout_id, task.attempt, what, chunk)
        try:
            if what == "done":
                await leases.done(task, 1.0, spans)
            else:
                await leases.fail(task, "boom", retryable=what == "fail", spans=spans)
        except FencedError:
            self.count("fenced")
            if what != "fail":  # a FAIL may be told so although it counted (docs/protocol.md, Working)
                self.oracle.not_kept(chunk)
        except BrokenError:
            self.count("unreported")
        else:
            self.count(what)
            self.oracle.reported(chunk)

    async def _live_as_gateway(self, name: str) -> None:
        """A producer that keeps its name from life to life, so that each life is a new epoch."""
        async with self._client(name, "gateway", session="gateway") as bus:
            self._gateway = bus
            try:
                while True:
                    await anyio.sleep(self.chance.uniform(0.5, 3.0))
                    # A late call of an agent that should be over, and one of no rollout.
                    rollout_id = self.chance.choice(self.planned)
                    await self._append(bus, rollout_id, self.chance.randint(1, 3), must_live=True)
                    await self._append(bus, "", 0, must_live=True)
            finally:
                self._gateway = None

    async def _append(self, bus: Client, rollout_id: str, attempt: int, *, must_live: bool = False) -> None:
        chunk = encode_spans([self._span(rollout_id, attempt)])
        self.oracle.appending(bus.session, chunk)
        try:
            await bus.append_blob(rollout_id, attempt, chunk, 1)
        except FencedError as exc:
            if not is_session_over(exc):
                self.count("span fenced")
                self.oracle.not_kept(chunk)
            elif must_live:
                raise
        except LightningBusError as exc:
            # Kept or not, nobody knows; the real gateway goes on after that, and so does this one.
            self.count(f"append: {type(exc).__name__}")
        else:
            self.oracle.appended(chunk)

    async def _live_as_trainer(self, name: str) -> None:
        """Submits what it is not sure to have submitted, asks, cancels, publishes."""
        chance, oracle = self.chance, self.oracle
        async with self._client(name, "trainer") as bus:
            while True:
                due = [i for i in self.planned if i not in self.accepted]
                if self.calm and not due:
                    await anyio.sleep(5.0)
                    continue
                what = chance.choice(["query", "cancel", "status", "put"])
                if due and (self.calm or chance.random() < 0.5):
                    what = "submit"
                try:
                    if what == "submit":
                        # Now and then with one that was submitted long ago: no news.
                        batch = due[: chance.randint(1, 4)] + chance.choices(self.planned[:1], k=chance.randint(0, 1))
                        await bus.submit([m.Submission(i, i.encode(), group=i[:1]) for i in batch])
                        self.accepted.update(batch)
                        oracle.submitted(batch)
                    elif what == "cancel" and self.accepted and chance.random() < 0.3:
                        ids = chance.sample(sorted(self.accepted), 1)
                        await bus.cancel(ids)
                        oracle.cancelled(ids)
                    elif what == "query":
                        oracle.seen(await bus.query(chance.choice([[], self.planned[:3]])))
                    elif what == "status":
                        oracle.counted(await bus.status())
                    elif what == "put":
                        await self._publish(bus)
                except BrokenError:
                    self.count("trainer waited in vain")
                await anyio.sleep(chance.uniform(0.1, 2.0))

    async def _publish(self, bus: Client) -> None:
        version = self.chance.randint(0, 5)
        resource = Resource("prompt", version, b"%d" % version)
        await bus.put(resource)
        self.oracle.published(resource)
        newest = await bus.get("prompt")
        assert newest is not None
        self.oracle.published(newest)

    async def _live_as_reader(self, name: str) -> None:
        """Reads on from its cursor and commits what it has read, one life after the other."""
        chance, oracle = self.chance, self.oracle
        async with self._client(name, "reader") as bus:
            offset = await bus.cursor("reader")
            oracle.cursor_at("reader", offset)
            while True:
                try:
                    records, after, end = await bus.fetch(offset, bytes_max=chance.choice([1, 2000]), wait_s=3.0)
                    oracle.fetched(offset, records, after, end)
                    offset = after
                    if records and chance.random() < 0.5:
                        oracle.moving_cursor("reader", offset)
                        at = await bus.cursor("reader", offset)
                        oracle.cursor_at("reader", at)
                        if at != offset:
                            raise Violation(f"a cursor goes where it is sent: {at} for {offset}")
                except BrokenError:
                    self.count("reader waited in vain")
                await anyio.sleep(chance.uniform(0.1, 1.0))

    def _client(self, name: str, role: str, *, session: str = "") -> Client:
        bus = Client(ADDRESS, role=role, limit_s=self.chance.choice([3.0, 15.0]) if not self.calm else 60.0)
        if session:
            bus._session.producer = session  # pyright: ignore[reportPrivateUsage]
        self._sessions[name] = bus.session
        return bus

    def _span(self, rollout_id: str, attempt: int) -> Span:
        self._chunks += 1
        span_id = self._chunks.to_bytes(8, "big")
        return Span(span_id, bytes(16), None, "s", 1, 2, rollout_id=rollout_id, attempt=attempt, sequence=self._chunks)
