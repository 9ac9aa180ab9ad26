"""Who may not does not: a real broker with keys, over real sockets, against strangers and against its own key holders.

Whatever is tried, what counts is what the broker kept: at the end an admin reads the whole log, and only what was
allowed stands there. What the wire itself must withstand (replay, half-open connections) is in test_door.py.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import msgspec
import pytest

from lightning_bus import Client
from lightning_bus import messages as m
from lightning_bus.broker.server import serve_broker
from lightning_bus.client.session import Session
from lightning_bus.config import BrokerSection
from lightning_bus.errors import AccessDenied, FencedError, LightningBusError
from lightning_bus.keys import KEY_ENV, ClientKey, create_key, ensure_run_keys, revoke_key
from lightning_bus.lifecycle import Status
from lightning_bus.records import Kind, Record
from lightning_bus.spans import Span, encode_spans
from tests.bus_fixtures import SECRET, span

pytestmark = pytest.mark.anyio
LIMIT_S = 60.0  # with what takes no time, on a machine that stands still for a while


@pytest.fixture(autouse=True)
def _no_key_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:  # pyright: ignore[reportUnusedFunction]
    monkeypatch.delenv(KEY_ENV, raising=False)


class Guarded:
    """A broker with keys, and a way in for each role."""

    def __init__(self, address: str, keys: Path) -> None:
        self.address = address
        self.keys = keys
        for role in ("agent", "worker-2"):
            create_key(keys, role, role.partition("-")[0])

    @asynccontextmanager
    async def session(self, name: str, token: str = "") -> AsyncGenerator[Session]:
        key = ClientKey.load(self.keys / f"{name}.key")
        async with Session(self.address, key.role, LIMIT_S, token=token, key=key) as session:
            yield session

    async def records(self) -> list[Record]:
        """Everything that was kept."""
        async with Client(self.address, key=self.keys / "admin.key", limit_s=LIMIT_S) as admin:
            return (await admin.fetch(0, bytes_max=1 << 20))[0]

    async def status(self, *reasons: str, count: int = 1) -> m.StatusIs:
        """The broker's status, once it has counted so many refusals for one of these reasons: it looks now and then."""
        async with self.session("admin") as admin:
            with anyio.fail_after(LIMIT_S):
                while True:
                    status = await admin.ask(m.StatusQuery(), m.StatusIs)
                    if not reasons or any(status.refused.get(reason, 0) >= count for reason in reasons):
                        return status

    async def submit(self, *rollout_ids: str) -> None:
        async with self.session("trainer") as trainer:
            task = msgspec.msgpack.encode("task")
            await trainer.ask(m.Submit([m.Submission(id_, task) for id_ in rollout_ids]), m.Accepted)


@asynccontextmanager
async def guarded(directory: Path, *, bind: str = "tcp://127.0.0.1:*") -> AsyncGenerator[Guarded]:
    ensure_run_keys(directory / "keys")
    section = BrokerSection(bind=bind, keys="auto", drain_s=0.0, lease_s=10 * LIMIT_S)
    up = anyio.Event()
    address: list[str] = []

    def started(bound: str) -> None:
        address.append(bound)
        up.set()

    async def serve() -> None:
        await serve_broker(section, directory / "log", SECRET, started=started)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(serve)
        await up.wait()
        yield Guarded(address[0], directory / "keys")
        tasks.cancel_scope.cancel()


async def lease(worker: Session) -> m.Task:
    """Ask for one task and return it."""
    arrived = anyio.Event()
    tasks: list[m.Task] = []

    def on_task(task: m.Task) -> None:
        tasks.append(task)
        arrived.set()

    worker.on_task = on_task
    await worker.ask(m.Heartbeat(1), m.Beat)
    with anyio.fail_after(LIMIT_S):
        await arrived.wait()
    return tasks[0]


async def append(session: Session, span_: Span) -> m.Acked:
    part = m.Part(span_.rollout_id, span_.attempt, 1)
    return await session.ask(m.Append([part]), m.Acked, [encode_spans([span_])], seq=1, count=1)


# -- the way it should be


async def test_each_role_does_its_part_of_a_rollout(tmp_path: Path) -> None:
    async with guarded(tmp_path) as bus:
        await bus.submit("r-1")
        async with bus.session("worker") as worker, bus.session("gateway") as gateway:
            task = await lease(worker)
            async with bus.session("agent", token=task.token) as agent:
                for session in (worker, gateway, agent):
                    acked = await append(session, span(rollout_id="r-1", attempt=1))
                    assert acked.fenced == []
            await worker.ask(m.Done("r-1", 1, 1.0), m.Accepted)
        assert sum(record.kind is Kind.SPANS for record in await bus.records()) == 3


# -- strangers


async def test_strangers_get_nowhere_and_are_counted(tmp_path: Path) -> None:
    async with guarded(tmp_path / "a") as bus:
        elsewhere = ClientKey.load(create_key(tmp_path / "b", "admin", "admin"))
        own = ClientKey.load(bus.keys / "admin.key")
        strangers = [
            None,  # no key at all
            elsewhere,  # a key of another broker, and of the same name
            ClientKey("admin", "admin", elsewhere.public, elsewhere.secret, own.server),  # that, knowing our server
        ]
        for key in strangers:
            with pytest.raises(AccessDenied):
                async with Session(bus.address, "admin", LIMIT_S, key=key) as session:
                    await session.ask(m.Drain(), m.Accepted)
        status = await bus.status("unknown key")
        assert not status.draining
        assert await bus.records() == []


async def test_a_broker_open_to_other_machines_wants_keys_and_works_with_them(tmp_path: Path) -> None:
    async with guarded(tmp_path, bind="tcp://0.0.0.0:*") as bus:
        bus.address = bus.address.replace("0.0.0.0", "127.0.0.1")
        await bus.submit("r-1")
        assert [record.rollout_id for record in await bus.records()] == ["r-1"]


# -- the wrong role


@pytest.mark.parametrize(
    ("role", "body"),
    [
        ("worker", m.Submit([m.Submission("r-9", b"\xc0")])),
        ("worker", m.Cancel(["r-1"])),
        ("worker", m.Fetch(0)),
        ("worker", m.Query()),
        ("agent", m.Heartbeat(1)),
        ("agent", m.Done("r-1", 1, 1.0)),
        ("agent", m.Fetch(0)),
        ("agent", m.Submit([m.Submission("r-9", b"\xc0")])),
        ("gateway", m.Heartbeat(1)),
        ("gateway", m.Fail("r-1", 1, "no")),
        ("trainer", m.Heartbeat(1)),
        ("trainer", m.Done("r-1", 1, 1.0)),
        ("trainer", m.Drain()),
        ("trainer", m.Purge(["r-1"])),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
async def test_what_is_not_a_roles_to_ask_is_refused_and_changes_nothing(
    tmp_path: Path, role: str, body: m.Body
) -> None:
    async with guarded(tmp_path) as bus:
        await bus.submit("r-1")
        before = await bus.records()
        async with bus.session(role) as session:
            with pytest.raises(AccessDenied, match=f"role '{role}'"):
                await session.exchange(body)
        assert await bus.records() == before
        assert (await bus.status()).refused["AccessDenied"] >= 1  # more, where silence made the session ask again


# -- another's work


async def test_a_worker_cannot_touch_what_another_holds(tmp_path: Path) -> None:
    async with guarded(tmp_path) as bus:
        await bus.submit("r-1")
        async with bus.session("worker") as owner, bus.session("worker-2") as other:
            await lease(owner)
            with pytest.raises(AccessDenied, match="a worker appends to attempts that it holds"):
                await append(other, span(rollout_id="r-1", attempt=1))
            for body in (m.Done("r-1", 1, 0.0), m.Fail("r-1", 1, "no"), m.Nack("r-1", 1), m.Release("r-1", 1)):
                with pytest.raises(FencedError):
                    await other.exchange(body)
            await owner.ask(m.Done("r-1", 1, 1.0), m.Accepted)
        assert not any(record.kind is Kind.SPANS for record in await bus.records())
        async with bus.session("admin") as admin:
            (rollout,) = (await admin.ask(m.Query(["r-1"]), m.Rollouts)).rollouts
        assert (rollout.status, rollout.reward) == (Status.SUCCEEDED, 1.0)


async def test_an_agent_appends_to_its_own_attempt_only(tmp_path: Path) -> None:
    async with guarded(tmp_path) as bus:
        await bus.submit("r-1", "r-2")
        async with bus.session("worker") as worker, bus.session("worker-2") as other:
            task, another = await lease(worker), await lease(other)
            async with bus.session("agent", token=task.token) as agent:
                with pytest.raises(AccessDenied, match="the attempt that its token names"):
                    await append(agent, span(rollout_id=another.rollout_id, attempt=another.attempt))
            async with bus.session("agent") as agent:
                with pytest.raises(AccessDenied, match="without a token"):
                    await append(agent, span(rollout_id=task.rollout_id, attempt=task.attempt))
            with pytest.raises(AccessDenied):
                async with bus.session("agent", token=f"{task.token[:-4]}AAAA"):
                    pass
        assert not any(record.kind is Kind.SPANS for record in await bus.records())


async def test_a_producer_cannot_be_impersonated_by_another_key(tmp_path: Path) -> None:
    """Neither its batches nor its epoch: a HELLO under its name would fence it."""
    async with guarded(tmp_path) as bus, bus.session("worker") as owner:
        key = ClientKey.load(bus.keys / "worker-2.key")
        thief = Session(bus.address, "worker", LIMIT_S, key=key)
        thief.producer = owner.producer
        with pytest.raises(AccessDenied, match="is not a name for the key 'worker-2'"):
            async with thief:
                pass
        assert (await append(owner, span())).fenced == []


# -- revoked while at work


async def test_a_revoked_worker_is_cut_off_and_what_it_held_goes_to_another(tmp_path: Path) -> None:
    async with guarded(tmp_path) as bus:
        await bus.submit("r-1")
        key = ClientKey.load(bus.keys / "worker.key")
        async with bus.session("worker") as revoked:
            held = await lease(revoked)
            async with bus.session("worker-2") as other:
                revoke_key(bus.keys, "worker")
                task = await lease(other)  # as soon as the broker has seen it, long before the lease expires
                assert (task.rollout_id, task.attempt) == ("r-1", held.attempt + 1)
                for body in (m.Done("r-1", 1, 1.0), m.Done("r-1", 2, 1.0), m.Heartbeat(1)):
                    with pytest.raises(LightningBusError, match="revoked") as caught:
                        await revoked.exchange(body)
                    assert isinstance(caught.value, AccessDenied)
                await other.ask(m.Done("r-1", 2, 0.5), m.Accepted)
        with pytest.raises(AccessDenied, match="was revoked"):
            async with Session(bus.address, "worker", LIMIT_S, key=key):
                pass
        async with bus.session("admin") as admin:
            (rollout,) = (await admin.ask(m.Query(["r-1"]), m.Rollouts)).rollouts
        assert (rollout.reward, rollout.attempt) == (0.5, 2)
        assert (await bus.status("revoked key", count=3)).refused["revoked key"] >= 3
