"""Who uses the bus: workers and their agents, the gateway, the trainer, readers, operators. Each is a process of its own.

They are honest and use the real client; what they are told they tell the oracle. A process is killed or paused now and
then, or ended by an error that it must not go on after, and is started again with nothing remembered but what the
trainer knows to be submitted. `workers` and `users` are what they do; here is how they live.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Awaitable, Callable

import anyio
from anyio.abc import TaskGroup

from lightning_bus.client import Client
from lightning_bus.errors import FencedError, LightningBusError, first_error
from lightning_bus.spans import Span, encode_spans
from tests.simulation.brokers import LEASE_S
from tests.simulation.network import Network
from tests.simulation.oracle import Oracle, is_session_over
from tests.simulation.virtual_time import VirtualLoop, process
from tests.simulation.workload import Workload

ADDRESS = "sim://broker"


class Clients:
    """All client processes of a history."""

    def __init__(
        self, chance: random.Random, oracle: Oracle, network: Network, loop: VirtualLoop, work: Workload,
        count: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.chance = chance
        self.oracle = oracle
        self.work = work
        self.count = count
        self.calm = False  # then nobody dawdles, fails or asks for more than to be done
        self.calm_s = 0.0  # since when
        self.accepted: dict[str, str] = {}  # plan → rollout, of what was submitted for sure
        self.held_by: dict[str, Callable[[], int]] = {}  # worker process → how many attempts it believes to hold
        self.waiting: set[str] = set()  # processes that have yet to be told how rollouts ended
        self._gateway: Gateway | None = None
        self._network = network
        self._loop = loop
        self._chunks = 0
        self._scopes: dict[str, anyio.CancelScope] = {}  # by process
        self._sessions: dict[str, str] = {}  # by process
        self._paused: set[str] = set()

    def start(self, tasks: TaskGroup, processes: dict[str, Callable[[str], Awaitable[None]]]) -> None:
        """Start every process; they live until the tasks are cancelled."""
        for name, live in processes.items():
            tasks.start_soon(self._lives, name, live)

    def kill_one(self) -> None:
        """SIGKILL: it says nothing more."""
        name = self.chance.choice(sorted(self._scopes))
        self.go_on(name)
        link = self._network.links.get(self._sessions.get(name, ""))
        if link is not None:
            link.client.close()
        self._scopes[name].cancel()

    def pause_one(self) -> None:
        """SIGSTOP, for longer than a lease or not."""
        name = self.chance.choice(sorted(self._scopes))
        if name in self._paused:
            return
        self._paused.add(name)
        self._loop.pause(name)
        self._loop.call_later(self.chance.uniform(0.5, 2.5 * LEASE_S), self.go_on, name)

    def go_on(self, name: str) -> None:
        """SIGCONT."""
        if name in self._paused:
            self._paused.discard(name)
            self._loop.go_on(name)

    def heal(self) -> None:
        """Calm: everyone goes on, and in good spirits."""
        self.calm, self.calm_s = True, anyio.current_time()
        for name in sorted(self._paused):
            self.go_on(name)

    def held(self) -> dict[str, int]:
        """How many attempts each worker believes to hold."""
        return {name: held() for name, held in self.held_by.items() if held()}

    async def _lives(self, name: str, live: Callable[[str], Awaitable[None]]) -> None:
        """A client process: killed now and then, or ended by an error that it may not go on after, and started again."""
        process.set(name)
        while True:
            with anyio.CancelScope() as self._scopes[name]:
                try:
                    await live(name)
                except* LightningBusError as group:
                    self.count(f"{name.partition('-')[0]} ended: {type(first_error(group)).__name__}")
            self.held_by.pop(name, None)
            self.waiting.discard(name)
            await anyio.sleep(self.chance.uniform(0.1, 2.0))

    # -- what they share

    def client(self, name: str, role: str, *, session: str = "") -> Client:
        """Return a client for a life of this process."""
        bus = Client(ADDRESS, role=role, limit_s=self.chance.choice([3.0, 15.0]) if not self.calm else 60.0)
        if session:
            bus._session.producer = session  # pyright: ignore[reportPrivateUsage]
        self._sessions[name] = bus.session
        return bus

    async def append(self, bus: Client, rollout_id: str, attempt: int, *, must_live: bool = False) -> None:
        """Append a span, and tell the oracle what came of it."""
        chunk = encode_spans([self.span(rollout_id, attempt)])
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

    async def call_gateway(self, rollout_id: str, attempt: int, limit_s: float) -> None:
        """Make a model call: the gateway, in its own process, appends its span."""
        if self._gateway is not None:
            call = rollout_id, attempt, anyio.Event()
            self._gateway.calls.append(call)
            self._gateway.called.set()
            with anyio.move_on_after(limit_s):
                await call[2].wait()

    async def serve_calls(self, bus: Client, tasks: TaskGroup) -> None:
        """Be the gateway that agents call."""
        gateway = self._gateway = Gateway()
        try:
            while True:
                while gateway.calls:
                    tasks.start_soon(self._serve_call, bus, *gateway.calls.popleft())
                gateway.called = anyio.Event()
                await gateway.called.wait()
        finally:
            self._gateway = None
            for *_, answered in gateway.calls:
                answered.set()

    async def _serve_call(self, bus: Client, rollout_id: str, attempt: int, answered: anyio.Event) -> None:
        try:
            await self.append(bus, rollout_id, attempt)
        finally:
            answered.set()

    def span(self, rollout_id: str, attempt: int) -> Span:
        """Return a span like no other."""
        self._chunks += 1
        span_id = self._chunks.to_bytes(8, "big")
        return Span(span_id, bytes(16), None, "s", 1, 2, rollout_id=rollout_id, attempt=attempt, sequence=self._chunks)


class Gateway:
    """The door of the gateway's process: what agents have asked for, each with its answer to come."""

    def __init__(self) -> None:
        self.calls: deque[tuple[str, int, anyio.Event]] = deque()
        self.called = anyio.Event()
