"""The client against a real broker: waiting, looking, dead letters, and what a worker may do with a task."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from pathlib import Path

import anyio
import anyio.lowlevel
import pytest

from lightning_bus import BlockingClient, Client, Leases, Resource, Status, Submission, Task
from lightning_bus import messages as m
from lightning_bus.client import face, waiting
from lightning_bus.errors import BrokenError, CallError, ConfigError, Conflict, FencedError, NotFound
from lightning_bus.records import Kind, Record
from tests.bus_fixtures import NOWHERE, PATIENCE_S, BrokerProcess, broker, span
from tests.unit.bus.test_client import TRIED_LEASES_S

pytestmark = pytest.mark.anyio


@contextlib.asynccontextmanager
async def bus_at(tmp_path: Path, lease_s: float = PATIENCE_S, max_attempts: int = 5) -> AsyncGenerator[Client]:
    async with (
        broker(tmp_path / "log", lease_s=lease_s, max_attempts=max_attempts) as address,
        Client(address, limit_s=PATIENCE_S) as bus,
    ):
        yield bus


async def next_task(leases: Leases) -> Task:
    with anyio.fail_after(PATIENCE_S):
        return await anext(aiter(leases))


async def carry_out(bus: Client, count: int) -> None:
    """End this many rollouts, each as its task says: "fail", or else with success."""

    async def end(task: Task) -> None:
        if task.task == b"fail":
            await leases.fail(task, "boom", retryable=False)
        else:
            await leases.done(task, float(task.attempt))

    async with bus.lease(64) as leases, anyio.create_task_group() as ending:
        for _ in range(count):
            ending.start_soon(end, await next_task(leases))


# -- waiting


async def test_thousands_are_waited_for_in_one_call_and_each_is_told_once(tmp_path: Path) -> None:
    ids = [f"r-{number}" for number in range(2000)]
    told: list[str] = []
    async with bus_at(tmp_path) as bus:
        await bus.submit([Submission(rollout_id, b"fail" if rollout_id == "r-7" else b"") for rollout_id in ids])
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(carry_out, bus, len(ids))
            with anyio.fail_after(PATIENCE_S):
                ends = await bus.wait(ids, on_end=lambda end: told.append(end.rollout_id))
        assert [end.rollout_id for end in ends] == ids and sorted(told) == sorted(ids)
        assert ends[7] == m.End("r-7", Status.FAILED, 1, None, "boom")
        assert ends[8] == m.End("r-8", Status.SUCCEEDED, 1, 1.0)
        assert await bus.wait(ids[:3]) == ends[:3]  # they have ended: at once


async def test_who_waits_hears_of_an_end_that_a_restarted_broker_could_not_push(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "RENEW_S", 0.3)
    with BrokerProcess(tmp_path / "log") as process:
        async with Client(process.address, limit_s=PATIENCE_S) as bus, anyio.create_task_group() as tasks:
            await bus.submit([Submission("r-1", b""), Submission("r-2", b"")])
            ended: list[str] = []

            async def wait() -> None:
                async for end in bus.ended(["r-1", "r-2"]):
                    ended.append(end.rollout_id)

            tasks.start_soon(wait)
            await carry_out(bus, 1)
            process.kill()
            await anyio.to_thread.run_sync(process.start)
            with anyio.fail_after(PATIENCE_S):
                await carry_out(bus, 1)
    assert ended == ["r-1", "r-2"]


async def test_waiting_ends_with_what_is_wrong(tmp_path: Path) -> None:
    async with bus_at(tmp_path) as bus:
        await bus.submit([Submission("r-1", b""), Submission("r-2", b"")])
        with pytest.raises(NotFound, match="r-9"):
            await bus.wait(["r-1", "r-9"])
        with pytest.raises(BrokenError, match=r"2 of the rollouts had not ended after 0.05 s, r-1 among them"):
            await bus.wait(["r-1", "r-2"], limit_s=0.05)
        assert await bus.wait([]) == []


async def test_a_silent_broker_is_named_to_who_waits(tmp_path: Path) -> None:
    with BrokerProcess(tmp_path / "log") as process:
        async with Client(process.address, limit_s=PATIENCE_S) as bus:
            await bus.submit([Submission("r-1", b"")])
            process.kill()
            bus._session.limit_s = 0.2  # pyright: ignore[reportPrivateUsage]
            with pytest.raises(BrokenError, match=r"did not answer WAIT within 0.2 s"):
                await bus.wait(["r-1"])


async def test_watching_yields_what_is_published_and_never_goes_back(tmp_path: Path) -> None:
    async with bus_at(tmp_path) as bus:
        await bus.put(Resource("policy", 3, b"3"))
        with anyio.fail_after(PATIENCE_S):
            async with contextlib.aclosing(bus.watch("policy", above=1)) as versions:
                assert (await anext(versions)).version == 3
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(bus.put, Resource("policy", 2, b"2"))
                    tasks.start_soon(bus.put, Resource("policy", 4, b"4"))
                    assert await anext(versions) == Resource("policy", 4, b"4")


# -- submitting and looking


async def test_many_rollouts_travel_in_several_messages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(face, "IDS_MAX", 3)
    async with bus_at(tmp_path) as bus:
        some = [Submission(f"r-{number}", b"x") for number in range(8)]
        assert await bus.submit(some) == (8, [one.rollout_id for one in some])
        assert (await bus.submit(some)).fresh == 0
        assert await bus.submit([]) == (0, [])
        assert await bus.cancel([one.rollout_id for one in some]) == 8


async def test_large_rollouts_fit_however_many_they_are(tmp_path: Path) -> None:
    async with bus_at(tmp_path) as bus:
        some = [Submission(f"r-{number}", b"x" * (3 << 20)) for number in range(7)]  # more than any message carries
        assert (await bus.submit(some)).fresh == 7
        assert [rollout.submission.rollout_id async for rollout in bus.rollouts()] == [one.rollout_id for one in some]


async def test_an_idempotency_key_gives_the_id_that_it_stands_for(tmp_path: Path) -> None:
    async with bus_at(tmp_path) as bus:
        assert await bus.submit([Submission("r-1", b"task", key="monday")]) == (1, ["r-1"])
        both = [Submission("r-2", b"task", key="monday"), Submission("r-3", b"task", key="tuesday")]
        assert await bus.submit(both) == (1, ["r-1", "r-3"])
        with pytest.raises(Conflict):
            await bus.submit([Submission("r-4", b"another task", key="monday")])


async def test_rollouts_are_paged_and_filtered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(face, "PAGE", 3)
    async with bus_at(tmp_path) as bus:
        ids = [f"r-{number}" for number in range(10)]
        await bus.submit([Submission(rollout_id, b"") for rollout_id in ids])
        await bus.cancel(ids[::2])
        assert [rollout.submission.rollout_id async for rollout in bus.rollouts()] == ids
        assert [r.submission.rollout_id async for r in bus.rollouts(status="cancelled")] == ids[::2]
        found = await bus.query(status="queued", after="r-3", limit=2)
        assert [rollout.submission.rollout_id for rollout in found] == ["r-5", "r-7"]
        with pytest.raises(CallError, match="no rollout is ever 'dead'"):
            await bus.query(status="dead")


async def test_dead_letters_are_replayed_under_new_ids_and_purged(tmp_path: Path) -> None:
    async with bus_at(tmp_path) as bus:
        await bus.submit([Submission("r-1", b"fail"), Submission("r-2", b"fail"), Submission("r-3", b"")])
        await carry_out(bus, 3)
        assert [letter.submission.rollout_id async for letter in bus.dead()] == ["r-1", "r-2"]
        replayed = await bus.replay(["r-1"])
        assert replayed == await bus.replay(["r-1"]) and replayed != ["r-1"]
        assert (await bus.query(replayed))[0].submission.task == b"fail"
        assert await bus.purge(["r-2"]) == 1
        assert (await bus.status()).dead == 0


async def test_a_draining_broker_hands_nothing_out(tmp_path: Path) -> None:
    async with bus_at(tmp_path, lease_s=0.5) as bus, bus.lease(1) as leases:
        await bus.drain()
        assert (await bus.status()).draining
        await bus.submit([Submission("r-1", b"")])
        assert (await bus.query())[0].status is Status.QUEUED
        await bus.resume()
        assert (await next_task(leases)).rollout_id == "r-1"


# -- what a worker may do with a task


async def test_a_task_put_off_comes_again_and_counts_as_an_attempt(tmp_path: Path) -> None:
    async with bus_at(tmp_path, max_attempts=2) as bus, bus.lease(1) as leases:
        await bus.submit([Submission("r-1", b"")])
        await leases.nack(await next_task(leases), 0.01, "rate limited")
        task = await next_task(leases)
        assert task.attempt == 2
        await leases.nack(task, 0.01, "rate limited")
        (end,) = await bus.wait(["r-1"])
        assert end.status is Status.FAILED and "rate limited" in end.error


async def test_a_task_handed_back_costs_no_attempt(tmp_path: Path) -> None:
    async with bus_at(tmp_path, max_attempts=1) as bus:
        await bus.submit([Submission("r-1", b"")])
        async with bus.lease(1) as leases:
            for attempt in (1, 2, 3):
                task = await next_task(leases)
                assert task.attempt == attempt
                await leases.release(task)
            await leases.done(await next_task(leases), 1.0)
        assert await bus.wait(["r-1"]) == [m.End("r-1", Status.SUCCEEDED, 4, 1.0)]


async def test_what_a_worker_never_began_is_handed_back_when_it_leaves(tmp_path: Path) -> None:
    async with bus_at(tmp_path, lease_s=1000.0, max_attempts=1) as bus:
        await bus.submit([Submission("r-1", b""), Submission("r-2", b"")])
        async with bus.lease(2) as leases:
            while leases.held < 2:
                await anyio.lowlevel.checkpoint()
            await leases.done(await next_task(leases), 1.0)
        with anyio.fail_after(PATIENCE_S):  # far less than the lease
            await carry_out(bus, 1)
        assert [end.attempt for end in await bus.wait(["r-1", "r-2"])] == [1, 2]


async def test_a_task_that_crossed_our_stop_is_handed_back(tmp_path: Path) -> None:
    async with bus_at(tmp_path, lease_s=1000.0, max_attempts=1) as bus, bus.lease(1) as leases:
        late: list[m.Task] = []
        bus._session.on_task = late.append  # pyright: ignore[reportPrivateUsage]  # still on its way
        await bus.submit([Submission("r-1", b"")])
        while not late:
            await anyio.lowlevel.checkpoint()
        leases.stop()
        leases.take(late[0])
        assert leases.held == 0
        with anyio.fail_after(PATIENCE_S):
            while (await bus.query())[0].status is not Status.QUEUED:
                await anyio.lowlevel.checkpoint()


async def test_heartbeats_come_as_often_as_the_shortest_lease_needs(tmp_path: Path) -> None:
    async with bus_at(tmp_path, lease_s=1000.0) as bus, bus.lease(1) as leases:
        for lease_s in TRIED_LEASES_S:
            await bus.submit([Submission(f"kept-{lease_s}", b"", lease_s=lease_s, max_attempts=1)])
            task = await next_task(leases)
            assert task.lease_s == lease_s
            # The broker's own clock says when it is enough: one with the same lease, whose holder is silent, expires.
            async with Client(bus.address, role="silent") as other, other.lease(1):
                other._session.on_task = None  # pyright: ignore[reportPrivateUsage]
                await bus.submit([Submission(f"lost-{lease_s}", b"", lease_s=lease_s, max_attempts=1)])
                with anyio.fail_after(lease_s + PATIENCE_S):
                    await bus.wait([f"lost-{lease_s}"])
            with contextlib.suppress(*[FencedError] * (lease_s < TRIED_LEASES_S[-1])):
                return await leases.done(task, 1.0)


# -- reading where the log lies


async def test_reading_locally_yields_what_the_broker_would_across_its_restart(tmp_path: Path) -> None:
    with BrokerProcess(tmp_path / "log") as process:

        async def follow(bus: Client, records: list[Record], until: int) -> None:
            async with contextlib.aclosing(bus.follow()) as log:
                async for record in log:
                    records.append(record)
                    if len(records) == until:
                        return

        async with (
            Client(process.address, limit_s=PATIENCE_S) as remote,
            Client(process.address, log=tmp_path / "log", limit_s=PATIENCE_S) as local,
        ):
            await remote.submit([Submission(f"r-{number}", b"") for number in range(300)])
            here: list[Record] = []
            there: list[Record] = []
            with anyio.fail_after(PATIENCE_S):
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(follow, local, here, 320)
                    tasks.start_soon(follow, remote, there, 320)
                    for number in range(10):
                        await remote.append("", 0, [span(str(number))])
                    process.kill()
                    await anyio.to_thread.run_sync(process.start)
                    for number in range(10):
                        await remote.append("", 0, [span(str(number))])
    assert here == there and [record.offset for record in here] == list(range(320))
    assert [record.kind for record in here[-20:]] == [Kind.SPANS] * 20


async def test_the_log_of_another_broker_is_not_read_for_this_ones(tmp_path: Path) -> None:
    with BrokerProcess(tmp_path / "other") as process:
        async with Client(process.address, limit_s=PATIENCE_S) as other:
            await other.append("", 0, [span("another's")])
    with BrokerProcess(tmp_path / "log") as process:
        async with Client(process.address, log=tmp_path / "other", limit_s=PATIENCE_S) as bus:
            await bus.append("", 0, [span("ours")])
            with pytest.raises(
                ConfigError, match=r"other is not the log that the broker at .* writes: record 0 differs"
            ):
                await anext(bus.follow())


# -- without an event loop, and with a key


def test_blocking_code_waits_looks_and_operates_too(tmp_path: Path) -> None:
    with BrokerProcess(tmp_path / "log", max_attempts=1) as process, BlockingClient(process.address) as bus:
        bus.submit([Submission("r-1", b"fail"), Submission("r-2", b""), Submission("r-3", b"")])

        async def work() -> None:
            async with Client(process.address, role="worker") as worker:
                await carry_out(worker, 3)

        anyio.run(work)
        ends = bus.wait(["r-1", "r-2"])
        assert [end.status for end in ends] == [Status.FAILED, Status.SUCCEEDED]
        assert {end.rollout_id for end in bus.ended(["r-1", "r-2"])} == {"r-1", "r-2"}
        assert [letter.submission.rollout_id for letter in bus.dead()] == ["r-1"]
        assert len(list(bus.rollouts(status="succeeded"))) == 2
        assert bus.purge(["r-1"]) == 1
        bus.drain()
        assert bus.status().draining
        bus.resume()
        bus.put(Resource("policy", 1, b""))
        assert next(bus.watch("policy")).version == 1
        with pytest.raises(NotFound):
            bus.wait(["r-9"])
        records = bus.follow()
        assert [next(records).offset for _ in range(5)] == list(range(5))
        records.close()


def test_a_key_that_is_none_is_told_before_anything_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "worker.key").write_text("not a key", encoding="utf-8")
    with pytest.raises(ConfigError, match="worker.key is no key file"):
        Client(NOWHERE, key=tmp_path / "worker.key")
    monkeypatch.setenv("LIGHTNING_BUS_KEY", str(tmp_path / "missing.key"))
    with pytest.raises(ConfigError, match="cannot read the key"):
        Client(NOWHERE)
