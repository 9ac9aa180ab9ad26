"""The client against a real broker."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import AsyncGenerator
from pathlib import Path

import anyio
import pytest

from lightning_bus import BlockingClient, Client, Leases, Resource, Status, Submission, Task, decode_spans, wire
from lightning_bus import messages as m
from lightning_bus.errors import BrokenError, ClosedError, FencedError, MessageTooLarge, NotFound, RemoteProtocolError
from lightning_bus.records import Kind, Record
from lightning_bus.transport import Channel, Router, bind_router
from tests.bus_fixtures import NOWHERE, PATIENCE_S, BrokerProcess, broker, span

pytestmark = pytest.mark.anyio
# A machine that stands still for longer than a lease loses it, and rightly so. Then the next one is tried.
TRIED_LEASES_S = (0.4, 2.0, 10.0, 40.0)


@contextlib.asynccontextmanager
async def bus_at(tmp_path: Path, lease_s: float = PATIENCE_S) -> AsyncGenerator[Client]:
    async with broker(tmp_path / "log", lease_s=lease_s) as address, Client(address, limit_s=PATIENCE_S) as bus:
        yield bus


async def records_of(bus: Client) -> list[Record]:
    return (await bus.fetch(0))[0]


async def first_task(leases: Leases) -> Task:
    with anyio.fail_after(PATIENCE_S):
        return await anext(aiter(leases))


# -- spans


async def test_a_rollout_goes_round(tmp_path: Path) -> None:
    async with bus_at(tmp_path) as bus:
        assert await bus.submit([Submission("r-1", b"task")]) == (1, ["r-1"])
        async with bus.lease(1) as leases:
            task = await first_task(leases)
            assert (task.rollout_id, task.attempt, task.task) == ("r-1", 1, b"task")
            await bus.append("r-1", 1, [span("step")])
            await leases.done(task, 1.0, [span("last")])
            assert leases.held == 0
        (rollout,) = await bus.query(["r-1"])
        assert (rollout.status, rollout.reward) == (Status.SUCCEEDED, 1.0)
        names = [s.name for r in await records_of(bus) if r.kind is Kind.SPANS for s in decode_spans(r.body)]
        assert names == ["step", "last"]


async def test_concurrent_appends_travel_together_and_each_gets_its_own_verdict(tmp_path: Path) -> None:
    async with bus_at(tmp_path) as bus:
        await bus.submit([Submission("r-1", b"")])
        verdicts: dict[int, str] = {}

        async def append(number: int) -> None:
            try:
                # Every third is for an attempt that does not exist.
                await bus.append("r-1", 1 + (number % 3 == 0), [span(str(number))])
                verdicts[number] = "kept"
            except FencedError as exc:
                assert "r-1 attempt 2" in str(exc)
                verdicts[number] = "fenced"

        async with bus.lease(1) as leases:
            await first_task(leases)
            async with anyio.create_task_group() as tasks:
                for number in range(300):
                    tasks.start_soon(append, number)
        kept = [number for number in range(300) if number % 3]
        assert verdicts == {number: "kept" if number % 3 else "fenced" for number in range(300)}
        spans = [record for record in await records_of(bus) if record.kind is Kind.SPANS]
        assert [int(s.name) for r in spans for s in decode_spans(r.body)] == kept  # in the order of the calls
        assert len(Counter(record.seq for record in spans)) < 20  # batches, not one a call


async def test_an_append_that_is_given_up_by_its_caller_harms_no_other(tmp_path: Path) -> None:
    async with bus_at(tmp_path) as bus:
        with anyio.move_on_after(0):
            await bus.append("", 0, [span("abandoned")])
        await bus.append("", 0, [span("kept")])
        names = [decode_spans(record.body)[0].name for record in await records_of(bus)]
        assert names in (["abandoned", "kept"], ["kept"])


async def test_a_chunk_that_is_too_large_is_refused_before_it_is_sent(tmp_path: Path) -> None:
    async with bus_at(tmp_path) as bus:
        with pytest.raises(MessageTooLarge, match=f"exceeds the limit of {m.BLOB_BYTES_MAX}. Append fewer spans"):
            await bus.append("", 0, [span("big", data=b"x" * m.BLOB_BYTES_MAX)])
        await bus.append("", 0, [span("largest", data=b"x" * (m.BLOB_BYTES_MAX - 200))])
        records, _, _ = await bus.fetch(0)
        assert len(records) == 1


async def test_after_a_refused_batch_the_next_one_is_taken(tmp_path: Path) -> None:
    async with bus_at(tmp_path) as bus:
        bus._spool._seq = 5  # pyright: ignore[reportPrivateUsage]  # as after a batch whose fate is unknown
        with pytest.raises(
            RemoteProtocolError, match="has batches up to 0 of client-.*, but has acknowledged all before 6"
        ):
            await bus.append("", 0, [span("refused")])
        await bus.append("", 0, [span("kept")])
        assert [decode_spans(record.body)[0].name for record in await records_of(bus)] == ["kept"]


# -- the broker goes away


async def test_a_restarted_broker_is_only_latency(tmp_path: Path) -> None:
    with BrokerProcess(tmp_path / "log") as process:
        async with Client(process.address, limit_s=PATIENCE_S) as bus:
            await bus.append("", 0, [span("0")])
            for number in range(1, 4):
                process.kill()
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(bus.append, "", 0, [span(str(number))])
                    tasks.start_soon(bus.submit, [Submission(f"r-{number}", b"")])
                    tasks.start_soon(anyio.to_thread.run_sync, process.start)
            records = await records_of(bus)
            names = [decode_spans(record.body)[0].name for record in records if record.kind is Kind.SPANS]
            assert names == ["0", "1", "2", "3"]
            assert sum(record.kind is Kind.ROLLOUT for record in records) == 3


async def test_a_silent_broker_is_named_with_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with broker(tmp_path / "log") as address, Client(address, limit_s=PATIENCE_S) as bus:
        bus._session.limit_s = 0.1  # pyright: ignore[reportPrivateUsage]
        monkeypatch.setattr(Channel, "send", lambda channel, frames: True)  # taken, and never arrived
        with pytest.raises(BrokenError, match=rf"{address} did not answer STATUS within 0.1 s"):
            await bus.status()
        with pytest.raises(BrokenError, match=rf"{address} did not answer APPEND within 0.1 s"):
            await bus.append("", 0, [span()])


async def test_bytes_that_are_no_message_fail_who_waits_and_not_the_client() -> None:
    router, address = bind_router("tcp://127.0.0.1:*")
    with router:

        async def answer_badly_once(router: Router) -> None:
            bad = True
            while True:
                for peer, _, frames, _ in await router.receive():
                    message = wire.decode(frames)
                    body = (
                        m.Welcome(1, 0, 1 << 24, 10.0, 0) if isinstance(message.body, m.Hello) else m.CursorAt("c", 7)
                    )
                    good = wire.encode(body, request=message.header.request)
                    if isinstance(message.body, m.Commit) and bad:
                        good, bad = [good[0], b"\xc1"], False
                    router.send([peer, *good])

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(answer_badly_once, router)
            async with Client(address, limit_s=PATIENCE_S) as bus:
                with pytest.raises(RemoteProtocolError):
                    await bus.cursor("c")
                assert await bus.cursor("c") == 7
            tasks.cancel_scope.cancel()


async def test_a_refusal_is_raised_as_what_it_is(tmp_path: Path) -> None:
    async with bus_at(tmp_path) as bus:
        with pytest.raises(NotFound, match="r-9"):
            await bus.cancel(["r-9"])


# -- closing


async def test_a_closed_client_says_so() -> None:
    bus = Client(NOWHERE)
    for call in (bus.status, lambda: bus.append("", 0, [])):
        with pytest.raises(ClosedError, match="use it inside `async with`"):
            await call()


async def test_who_waits_when_the_client_closes_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failures: list[type[BaseException]] = []

    async def told(call: object, *args: object) -> None:
        try:
            await call(*args)  # type: ignore[operator]  # pyright: ignore[reportGeneralTypeIssues]
        except ClosedError as exc:
            failures.append(type(exc))

    async with broker(tmp_path / "log") as address:
        async with anyio.create_task_group() as tasks:
            async with Client(address, limit_s=PATIENCE_S) as bus:
                monkeypatch.setattr(Channel, "send", lambda channel, frames: True)  # taken, and never arrived
                for number in range(3):  # one on its way, two in the spool
                    tasks.start_soon(told, bus.append, "", 0, [span(str(number))])
                tasks.start_soon(told, bus.status)
                while not bus._spool._on_way or len(bus._session._pending) < 2:  # pyright: ignore[reportPrivateUsage]
                    await anyio.lowlevel.checkpoint()
            with anyio.fail_after(PATIENCE_S):
                while len(failures) < 4:
                    await anyio.lowlevel.checkpoint()
    assert failures == [ClosedError] * 4


# -- leases


async def test_an_attempt_that_was_cancelled_is_called_back_as_lost(tmp_path: Path) -> None:
    async with bus_at(tmp_path) as bus:
        await bus.submit([Submission("r-1", b"")])
        async with bus.lease(1) as leases:
            task = await first_task(leases)
            lost = anyio.Event()
            leases.on_lost(task, lost.set)
            await bus.cancel(["r-1"])
            leases._beat_now.set()  # pyright: ignore[reportPrivateUsage]  # it would come in time, we want it now
            with anyio.fail_after(PATIENCE_S):
                await lost.wait()
            assert leases.held == 0
            with pytest.raises(FencedError, match="it is cancelled"):
                await leases.done(task, 1.0)
            late: list[str] = []
            leases.on_lost(task, lambda: late.append("told at once"))
            assert late


async def test_an_attempt_lost_before_it_was_taken_is_not_handed_out(tmp_path: Path) -> None:
    async with bus_at(tmp_path) as bus:
        async with bus.lease(2) as leases:
            await bus.submit([Submission("r-1", b""), Submission("r-2", b"")])
            while leases.held < 2:
                await anyio.lowlevel.checkpoint()
            await bus.cancel(["r-1"])
            leases._beat_now.set()  # pyright: ignore[reportPrivateUsage]
            while leases.held > 1:
                await anyio.lowlevel.checkpoint()
            assert (await first_task(leases)).rollout_id == "r-2"


async def test_heartbeats_keep_a_lease_longer_than_its_length(tmp_path: Path) -> None:
    for lease_s in TRIED_LEASES_S:
        async with bus_at(tmp_path / str(lease_s), lease_s=lease_s) as bus, bus.lease(1) as leases:
            await bus.submit([Submission("r-1", b"")])
            task = await first_task(leases)
            # The broker's own clock says when it is enough: another attempt is not renewed by anyone and expires.
            async with Client(bus.address, role="silent") as other, other.lease(1):
                other._session.on_task = None  # pyright: ignore[reportPrivateUsage]
                await bus.submit([Submission("r-2", b"", max_attempts=1)])
                while (await bus.query(["r-2"]))[0].status is not Status.FAILED:
                    await anyio.lowlevel.checkpoint()
            with contextlib.suppress(*[FencedError] * (lease_s < TRIED_LEASES_S[-1])):
                return await leases.done(task, 1.0)


async def test_stop_ends_the_iterator_and_the_broker_knows_at_once(tmp_path: Path) -> None:
    async with bus_at(tmp_path, lease_s=1000.0) as bus, bus.lease(2) as leases:
        await bus.submit([Submission("r-1", b"")])
        task = await first_task(leases)
        leases.stop()
        assert [late async for late in leases] == []
        with anyio.fail_after(PATIENCE_S):  # the next regular heartbeat is 200 s away
            while (await bus.status()).slots:
                await anyio.lowlevel.checkpoint()
        await bus.submit([Submission("r-2", b"")])
        await leases.done(task, 1.0)
        assert [rollout.status for rollout in await bus.query()] == [Status.SUCCEEDED, Status.QUEUED]


async def test_a_task_that_crossed_our_stop_is_not_held(tmp_path: Path) -> None:
    async with bus_at(tmp_path) as bus, bus.lease(1) as leases:
        leases.stop()
        leases.take(Task("r-1", 1, b"", "", 10.0))
        assert leases.held == 0


async def test_a_worker_that_leaves_gets_no_more_tasks(tmp_path: Path) -> None:
    async with bus_at(tmp_path, lease_s=60.0) as bus:
        async with bus.lease(2):
            while not (await bus.status()).slots:
                await anyio.lowlevel.checkpoint()
        assert (await bus.status()).slots == 0
        await bus.submit([Submission("r-1", b"")])
        assert (await bus.query())[0].status is Status.QUEUED


async def test_a_failed_attempt_is_leased_again(tmp_path: Path) -> None:
    async with bus_at(tmp_path) as bus:
        await bus.submit([Submission("r-1", b"", max_attempts=2)])
        async with bus.lease(1) as leases:
            await leases.fail(await first_task(leases), "boom", spans=[span("what happened")])
            task = await first_task(leases)
            assert task.attempt == 2
            await leases.fail(task, "boom again")
        (rollout,) = await bus.query()
        assert (rollout.status, rollout.error) == (Status.FAILED, "boom again")


# -- reading


async def test_following_yields_every_record_once_in_order(tmp_path: Path) -> None:
    async with bus_at(tmp_path) as bus:
        got: list[int] = []

        async def follow() -> None:
            async for record in bus.follow():
                got.append(record.offset)
                if len(got) == 60:
                    return

        with anyio.fail_after(PATIENCE_S):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(follow)
                for number in range(60):
                    await bus.append("", 0, [span(str(number))])
        assert got == list(range(60))


async def test_a_cursor_is_kept_for_its_name(tmp_path: Path) -> None:
    async with bus_at(tmp_path) as bus:
        await bus.append("", 0, [span()])
        assert await bus.cursor("trainer", 1) == 1
        assert await bus.cursor("trainer") == 1


# -- without an event loop


def test_blocking_code_does_the_same(tmp_path: Path) -> None:
    with BrokerProcess(tmp_path / "log") as process, BlockingClient(process.address, role="tool") as bus:
        assert bus.session.startswith("tool-")
        assert bus.submit([Submission("r-1", b"")]).fresh == 1
        bus.append("", 0, [span("a"), span("b")])
        bus.put(Resource("p", 1, b"x"))
        assert bus.get("p") == Resource("p", 1, b"x")
        records = bus.follow()
        assert [next(records).kind for _ in range(3)] == [Kind.ROLLOUT, Kind.SPANS, Kind.RESOURCE]
        assert bus.cursor("c", 2) == 2
        assert bus.cancel(["r-1"]) == 1
        assert bus.query()[0].status is Status.CANCELLED
        assert bus.status().rollouts["cancelled"] == 1
        with pytest.raises(NotFound):
            bus.cancel(["r-9"])
    with pytest.raises(ClosedError, match="inside `with`"):
        bus.status()


def test_a_blocking_client_without_a_broker_says_so_and_leaves_nothing_running() -> None:
    with pytest.raises(BrokenError, match="did not answer HELLO"), BlockingClient(NOWHERE, limit_s=0.1):
        raise AssertionError("nobody is there")
