"""Everybody but the workers: the gateway, the trainer, a reader, those who wait and watch, and an operator.

Each function is one life of a process; what it is told it tells the oracle. An error that a real one would not go on
after ends that life.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import anyio
import msgspec

from lightning_bus.client import Client
from lightning_bus.errors import BrokenError, Conflict, LightningBusError, NotFound, RetiredError, TryAgain
from lightning_bus.resources import Resource
from tests.simulation.clients import Clients
from tests.simulation.ledger import Violation
from tests.simulation.workers import Worker
from tests.simulation.workload import Plan

IN_VAIN = (BrokenError, TryAgain)  # asked for too long, or of a broker that is busy: asked again


def processes(clients: Clients) -> dict[str, Callable[[str], Awaitable[None]]]:
    """Return who is there in this history, by name of the process."""
    work = clients.work
    users = Users(clients)
    found: dict[str, Callable[[str], Awaitable[None]]] = {}
    for index, slots in enumerate(work.slots):
        runtime = clients.chance.random() < work.runtimes

        async def work_on(name: str, slots: int = slots, runtime: bool = runtime) -> None:
            await Worker(clients, name, slots, runtime).live()

        found[f"worker-{index}"] = work_on
    found["trainer"] = users.train
    if work.gateway:
        found["gateway"] = users.serve_calls
    if work.reader:
        found["reader"] = users.read
    for index in range(work.waiters):
        found[f"waiter-{index}"] = users.wait
    if work.watcher:
        found["watcher"] = users.watch
    if work.replays or work.drains:
        found["operator"] = users.operate
    return found


class Users:
    """The lives."""

    def __init__(self, clients: Clients) -> None:
        self.clients = clients
        self.chance = clients.chance
        self.oracle = clients.oracle
        self.work = clients.work
        self._replays = clients.work.replays
        self._resumed = False  # somebody has told the broker to go on: a copy of that may come late

    async def serve_calls(self, name: str) -> None:
        """The gateway: a producer that keeps its name from life to life, so that each life is a new epoch."""
        clients, chance = self.clients, self.chance
        async with clients.client(name, "gateway", session="gateway") as bus, anyio.create_task_group() as calls:
            calls.start_soon(clients.serve_calls, bus, calls)
            while True:
                await anyio.sleep(chance.uniform(0.5, 3.0))
                # A late call of an agent that should be over, and some of no rollout, at once.
                rollout_id = chance.choice(self.work.plans).name
                for _ in range(chance.choice([0, 0, 12] if self.work.pipelines else [0, 0, 2])):
                    calls.start_soon(clients.append, bus, "", 0)
                await clients.append(bus, rollout_id, chance.randint(1, 3), must_live=True)
                await clients.append(bus, "", 0, must_live=True)

    async def train(self, name: str) -> None:
        """The trainer: submits what it is not sure to have submitted, asks, cancels, publishes."""
        clients, chance, oracle = self.clients, self.chance, self.oracle
        async with clients.client(name, "trainer") as bus:
            while True:
                due = [plan for plan in self.work.plans if plan.name not in clients.accepted]
                if clients.calm and not due:
                    await self._publish(bus, above=True)
                    await anyio.sleep(5.0)
                    continue
                what = chance.choice(["query", "cancel", "status", "put", "again", "other"])
                if due and (clients.calm or chance.random() < 0.5):
                    what = "submit"
                known = sorted(clients.accepted.values())
                try:
                    if what == "submit":
                        await self._submit(bus, due[: chance.randint(1, 4)])
                    elif what == "again" and clients.accepted:
                        await self._submit(bus, [p for p in self.work.plans if p.name in clients.accepted][:2])
                    elif what == "other" and known and not self.work.retention:
                        await self._submit_other(bus, chance.choice(known))
                    elif what == "cancel" and known and chance.random() < 0.3:
                        ids = chance.sample(known, 1)
                        await bus.cancel(ids)
                        oracle.cancelled(ids)
                    elif what == "query":
                        oracle.seen(await bus.query(chance.choice([[], known[:3]])))
                    elif what == "status":
                        oracle.counted(await bus.status())
                    elif what == "put":
                        await self._publish(bus)
                except IN_VAIN:
                    clients.count("trainer waited in vain")
                except NotFound:
                    if not self.work.retention:
                        raise
                await anyio.sleep(chance.uniform(0.1, 2.0))

    async def _submit(self, bus: Client, plans: list[Plan]) -> None:
        submissions = [plan.submission_now(self.chance) for plan in plans]
        told = await bus.submit(submissions)
        for plan, submission, rollout_id in zip(plans, submissions, told.rollout_ids, strict=True):
            self.clients.accepted[plan.name] = rollout_id
            self.oracle.submitted(submission, rollout_id)

    async def _submit_other(self, bus: Client, rollout_id: str) -> None:
        """Somebody gives a known name to another task."""
        life = self.oracle.disk.lives[rollout_id]
        assert life.submission is not None
        other = msgspec.structs.replace(life.submission, task=b"\x01")
        try:
            await bus.submit([other])
        except Conflict:
            self.clients.count("conflict")
        else:
            raise Violation(f"a known id with another task is refused: {rollout_id}")

    async def _publish(self, bus: Client, *, above: bool = False) -> None:
        version = self.chance.randint(0, 5)
        if above:
            version = 1 + max((resource.version for resource in self.oracle.disk.resources.values()), default=-1)
        resource = Resource("prompt", version, b"%d" % version)
        await bus.put(resource)
        self.oracle.published(resource)
        newest = await bus.get("prompt")
        assert newest is not None
        self.oracle.published(newest)

    async def read(self, name: str) -> None:
        """Reads on from its cursor and commits what it has read, one life after the other."""
        clients, chance, oracle = self.clients, self.chance, self.oracle
        async with clients.client(name, "reader") as bus:
            offset = await bus.cursor("reader")
            if offset == 0:
                oracle.moving_cursor("reader", 0)
                offset = await bus.cursor("reader", 0)  # a promise to keep what it has not read
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
                except IN_VAIN:
                    clients.count("reader waited in vain")
                except RetiredError:  # dropped before there was a cursor, or the oracle had said so
                    clients.count("reader came too late")
                    offset = (await bus.status()).first_offset
                await anyio.sleep(chance.uniform(0.1, 6.0 if self.work.retention else 1.0))

    async def wait(self, name: str) -> None:
        """Waits until rollouts end, a few or all."""
        clients, chance = self.clients, self.chance
        async with clients.client(name, "waiter") as bus:
            while True:
                known = sorted(self.oracle.disk.lives)
                if not known:
                    await anyio.sleep(1.0)
                    continue
                ids = known if clients.calm else chance.sample(known, chance.randint(1, len(known)))
                clients.waiting.add(name)
                left = set(ids)
                asked_s = anyio.current_time()
                try:
                    async for end in bus.ended(ids, limit_s=None if clients.calm else chance.uniform(1.0, 20.0)):
                        if end.rollout_id not in left:
                            raise Violation(f"each end is told once: {end}")
                        left.discard(end.rollout_id)
                        self.oracle.told_end(end, asked_s if clients.calm and asked_s > clients.calm_s else None)
                except IN_VAIN:
                    clients.count("waiter waited in vain")
                except NotFound:
                    if not self.work.retention:
                        raise
                else:
                    if left:
                        raise Violation(f"every end is told: not {sorted(left)}")
                    clients.count("waited")
                clients.waiting.discard(name)
                await anyio.sleep(chance.uniform(0.1, 2.0))

    async def watch(self, name: str) -> None:
        """Watches a resource, and sees to it that there is something to watch."""
        clients, chance, oracle = self.clients, self.chance, self.oracle
        async with clients.client(name, "watcher") as bus:
            above = -1
            asked_s = anyio.current_time()
            async for resource in bus.watch("prompt", above, wait_s=20.0):
                prompt = clients.calm and asked_s > clients.calm_s
                oracle.watched(resource, above, asked_s if prompt else None)
                clients.count("watched")
                above, asked_s = resource.version, anyio.current_time()
                if chance.random() < 0.2:
                    return

    async def operate(self, name: str) -> None:
        """Looks after dead letters, drains the broker and lets it go on."""
        clients, chance = self.clients, self.chance
        async with clients.client(name, "admin") as bus:
            while True:
                try:
                    if (await bus.status()).draining:
                        await self._resume(bus)
                    if self.work.drains and not clients.calm and chance.random() < 0.3:
                        await self._drain(bus)
                    if self._replays and not clients.calm:
                        await self._sort_letters(bus)
                except IN_VAIN:
                    clients.count("operator waited in vain")
                except LightningBusError as exc:
                    # Between two questions a letter may have been replayed by a copy of an older one, or dropped.
                    if not (self.work.retention and isinstance(exc, NotFound)):
                        raise
                await anyio.sleep(chance.uniform(0.5, 3.0))

    async def _drain(self, bus: Client) -> None:
        asked_s = anyio.current_time()
        await bus.drain()
        told_s = anyio.current_time()
        await anyio.sleep(self.chance.uniform(0.5, 8.0))
        if not self._resumed:
            self.oracle.drained(asked_s, told_s, anyio.current_time())
            self.clients.count("drained")
        await self._resume(bus)

    async def _resume(self, bus: Client) -> None:
        self._resumed = True
        await bus.resume()

    async def _sort_letters(self, bus: Client) -> None:
        letters = [letter async for letter in bus.dead()]
        self.oracle.seen(letters)
        self.oracle.dead_letters(letters)
        ids = [letter.submission.rollout_id for letter in letters]
        if not ids:
            return
        letter_id = self.chance.choice(ids)
        if self.chance.random() < 0.5:
            self._replays -= 1
            [replay_id] = await bus.replay([letter_id])
            self.oracle.replayed(letter_id, replay_id)
            self.clients.count("replayed")
        else:
            await bus.purge([letter_id])
            self.oracle.purged(letter_id)
            self.clients.count("purged")
