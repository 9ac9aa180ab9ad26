"""Worker processes: some the real runtime with a scripted agent, some bare leases that do what the runtime never would.

Both report through `Observed`, which tells the oracle what is said of an attempt before it is said, and what the
broker made of it after.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import anyio

from lightning_bus import messages as m
from lightning_bus.client import Leases
from lightning_bus.errors import BrokenError, FencedError
from lightning_bus.spans import Span, encode_spans
from tests.simulation.brokers import LEASE_S
from tests.simulation.clients import Clients
from workers import Nack, NonRetryable
from workers.agent import agent_of
from workers.config import WorkerSection
from workers.context import RolloutContext
from workers.runtime import run_worker

CALL_LIMIT_S = 20.0  # then an agent gives a model call up


class Worker:
    """One life of a worker process."""

    def __init__(self, clients: Clients, name: str, slots: int, runtime: bool) -> None:
        self.clients = clients
        self.chance = clients.chance
        self._name = name
        self._slots = slots
        self._runtime = runtime

    async def live(self) -> None:
        clients = self.clients
        async with clients.client(self._name, "worker") as self._bus, anyio.create_task_group() as tasks:
            stop = anyio.Event()
            if self.chance.random() < 0.2 and not clients.calm:
                tasks.start_soon(self._retire, stop)
            if self._runtime:
                section = WorkerSection(
                    concurrency=self._slots + 1,  # one alone would write into this process's environment
                    grace_s=self.chance.choice([0.0, 1.0, 4.0]),
                    task_bytes_max=clients.work.task_bytes_max,
                )
                await run_worker(self, agent_of(self._agent), section, gateway_url="sim://gateway", stop=stop)
            else:
                await self._work_bare(stop)
            tasks.cancel_scope.cancel()

    async def _retire(self, stop: anyio.Event) -> None:
        """SIGTERM: take no more, end what runs."""
        await anyio.sleep(self.chance.uniform(1.0, 15.0))
        stop.set()

    # What the runtime asks of a client.

    @asynccontextmanager
    async def lease(self, slots: int, *, task_bytes_max: int = 0) -> AsyncGenerator[Observed]:
        async with self._bus.lease(slots, task_bytes_max=task_bytes_max) as leases:
            self.clients.held_by[self._name] = lambda: leases.held
            yield Observed(leases, self._bus.session, self.clients)

    # -- an agent, and what it is to the runtime

    async def _agent(self, rollout: RolloutContext) -> float:
        await self._think(rollout.rollout_id, rollout.attempt)
        life = self.clients.oracle.disk.life(rollout.rollout_id)
        timed = life is not None and life.submission is not None and life.submission.timeout_s > 0
        match self._outcome(timed):
            case "fail":
                raise RuntimeError("boom")
            case "final":
                raise NonRetryable("boom for ever")
            case "nack":
                raise Nack(self.chance.choice([0.0, 0.4, 3.0]))
            case "hang":
                await anyio.sleep_forever()
            case _:
                return 1.0

    async def _think(self, rollout_id: str, attempt: int) -> None:
        """A few model calls through the gateway, spans of its worker's own."""
        chance = self.chance
        for _ in range(chance.randint(0, 3)):
            await anyio.sleep(
                0.1 if self.clients.calm else chance.expovariate(1.0 / chance.choice([0.2, 0.2, 1.0, LEASE_S]))
            )
            if chance.random() < 0.7:
                await self.clients.call_gateway(rollout_id, attempt, CALL_LIMIT_S)
            else:
                await self.clients.append(self._bus, rollout_id, attempt)

    def _outcome(self, timed: bool) -> str:
        """How an attempt comes out. One without a time limit comes out in some way."""
        outcomes = ["done", "final", "fail", "nack", "release", "hang"]
        hands_back = self.clients.work.hands_back and not self.clients.calm
        weights = [8.0, 1.0, 0.0 if self.clients.calm else 2.0, hands_back, hands_back, 2.0 * timed]
        return self.chance.choices(outcomes, weights)[0]

    # -- without the runtime

    async def _work_bare(self, stop: anyio.Event) -> None:
        asked = self.lease(self._slots, task_bytes_max=self.clients.work.task_bytes_max)
        async with asked as leases, anyio.create_task_group() as attempts:

            async def stop_leases() -> None:
                await stop.wait()
                leases.stop()

            attempts.start_soon(stop_leases)
            async for task in leases:
                attempts.start_soon(self._carry_out, leases, task)

    async def _carry_out(self, leases: Observed, task: m.Task) -> None:
        lost = anyio.CancelScope()
        leases.on_lost(task, lost.cancel)
        with lost:
            await self._think(task.rollout_id, task.attempt)
            what = self._outcome(task.timeout_s > 0)
            if what == "hang":
                await anyio.sleep_forever()
        if lost.cancelled_caught:
            self.clients.count("lost")
            return
        spans = [self.clients.span(task.rollout_id, task.attempt)]
        try:
            if what == "done":
                await leases.done(task, 1.0, spans)
            elif what == "nack":
                await leases.nack(task, self.chance.choice([0.0, 0.4, 3.0]))
            elif what == "release":
                await leases.release(task)
            else:
                await leases.fail(task, "boom", retryable=what == "fail", spans=spans)
        except (FencedError, BrokenError):
            pass  # counted, and told the oracle


class Observed:
    """A worker's leases, watched."""

    def __init__(self, leases: Leases, session: str, clients: Clients) -> None:
        # What nobody began the client hands back by itself: that is said of an attempt too.
        self._release, leases.release = leases.release, self.release
        self._leases = leases
        self._session = session
        self._clients = clients

    def __getattr__(self, name: str) -> Any:
        return getattr(self._leases, name)

    def __aiter__(self) -> Observed:
        return self

    async def __anext__(self) -> m.Task:
        return await anext(self._leases)

    async def done(self, task: m.Task, reward: float | None, spans: Sequence[Span] = ()) -> None:
        with self._reported(task, "done", spans):
            await self._leases.done(task, reward, spans)

    async def fail(self, task: m.Task, error: str, *, retryable: bool = True, spans: Sequence[Span] = ()) -> None:
        with self._reported(task, "fail" if retryable else "final", spans):
            await self._leases.fail(task, error, retryable=retryable, spans=spans)

    async def nack(self, task: m.Task, delay_s: float, reason: str = "") -> None:
        with self._reported(task, "nack", (), delay_s):
            await self._leases.nack(task, delay_s, reason)

    async def release(self, task: m.Task) -> None:
        with self._reported(task, "release"):
            await self._release(task)

    @contextmanager
    def _reported(self, task: m.Task, what: str, spans: Sequence[Span] = (), delay_s: float = 0.0) -> Generator[None]:
        oracle, count = self._clients.oracle, self._clients.count
        chunk = encode_spans(spans) if spans else b""
        oracle.reporting(self._session, task, what, chunk, delay_s)
        try:
            yield
        except FencedError:
            count("fenced")
            oracle.report_fenced(task, what, chunk)
            raise
        except BrokenError:
            count("unreported")
            raise
        else:
            count(what)
            oracle.reported(self._session, task, what, chunk)
