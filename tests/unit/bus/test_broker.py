"""The broker behind its socket: what any peer may send it, and that an answer means what it says."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import anyio
import msgspec
import pytest
import zmq

from lightning_bus import Client, Resource, Submission, wire
from lightning_bus import messages as m
from lightning_bus.broker import server
from lightning_bus.broker.door import UNREADABLE_MAX
from lightning_bus.broker.fetching import WAITING_PEER_MAX
from lightning_bus.config import BrokerSection
from lightning_bus.errors import BrokenError, CallError, Conflict, VersionError
from lightning_bus.log.reader import LogReader
from tests.bus_fixtures import PATIENCE_S, SECRET, BrokerProcess, RawPeer, broker, span

pytestmark = pytest.mark.anyio


async def test_when_append_returns_another_process_reads_the_spans(tmp_path: Path) -> None:
    with BrokerProcess(tmp_path / "log") as process:
        async with Client(process.address) as bus:
            for number in range(20):
                await bus.append("", 0, [span(f"s-{number}")])
                with LogReader(tmp_path / "log") as reader:
                    assert reader.end_offset == number + 1


async def test_what_was_decided_is_durable_when_the_broker_has_stopped(tmp_path: Path) -> None:
    async with broker(tmp_path / "log") as address:
        with RawPeer(address) as peer:
            await peer.ask(m.Submit([Submission("r-1", b"")]), request=1)
    with LogReader(tmp_path / "log") as reader:
        assert [rollout.submission.rollout_id for rollout in reader.rollouts()] == ["r-1"]


async def test_a_peer_of_another_version_is_told_so(tmp_path: Path) -> None:
    async with broker(tmp_path / "log") as address:
        with RawPeer(address) as peer:
            header = msgspec.msgpack.encode([2, "an operation of version 2"])
            answer = await peer.ask_frames([header, b"whatever"])
            assert isinstance(answer.body, m.Error)
            assert answer.body.code == "VersionError"
            assert "version 2, this side version 1" in answer.body.message


GARBAGE = [
    [b""],
    [b"", b""],
    [b"x" * 5000, b""],
    [b"\xc1", b"\xc1"],
    [b"\x92\x01\x01"],
    [b"\x93\x01\x03\x00", b"\x91" * 10_000],
]


async def test_garbage_is_answered_with_an_error_and_harms_nobody(tmp_path: Path) -> None:
    async with broker(tmp_path / "log") as address:
        with RawPeer(address, "garbler") as garbler:
            for frames in GARBAGE:
                answer = await garbler.ask_frames(frames)
                assert isinstance(answer.body, m.Error)
                assert (answer.body.code, answer.header.request) == ("RemoteProtocolError", 0)
            async with Client(address) as bus:
                assert (await bus.submit([Submission("r-1", b"")])).fresh == 1


async def test_numbers_that_the_log_has_no_room_for_stop_at_the_door(tmp_path: Path) -> None:
    async with broker(tmp_path / "log") as address:
        with RawPeer(address) as peer:
            await peer.ask(m.Hello("raw"), request=1)
            for attempt, count in ((1 << 32, 1), (-1, 1), (0, 1 << 40), (0, -1)):
                answer = await peer.ask(m.Append([m.Part("", attempt, count)]), [b""], request=2, epoch=1, seq=1)
                assert isinstance(answer.body, m.Error)
            answer = await peer.ask(m.Fetch(-1), request=3)
            assert isinstance(answer.body, m.Error)
            answer = await peer.ask(m.Append([m.Part("", 0, 1)]), [b""], request=4, epoch=1, seq=1)
            assert isinstance(answer.body, m.Acked)


async def test_an_answer_that_is_too_large_is_an_error_and_not_the_end(tmp_path: Path) -> None:
    async with broker(tmp_path / "log") as address, Client(address) as bus:
        for number in range(3):
            await bus.submit([Submission(f"r-{number}", b"x" * (7 << 20))])
        with pytest.raises(CallError, match="ask for less at a time"):
            await bus.query()
        assert len(await bus.query(limit=2)) == 2


async def test_a_fetch_wakes_at_the_commit_it_waits_for(tmp_path: Path) -> None:
    async with broker(tmp_path / "log") as address:
        with RawPeer(address) as peer:
            async with Client(address) as bus:
                # Both go to the broker in this order, from one peer; the answer to the second frees the first.
                for frames in (
                    wire.encode(m.Fetch(0, wait_ms=30_000), request=1, producer="raw"),
                    wire.encode(m.StatusQuery(), request=2, producer="raw"),
                ):
                    peer.send(frames)
                assert (await peer.receive()).header.request == 2
                with anyio.fail_after(25):  # less than the wait
                    await bus.append("", 0, [span("awaited")])
                    chunk = await peer.receive()
            assert chunk.header.request == 1
            assert chunk.body == m.Chunk(1, 1)
            assert len(chunk.blobs) == 1


async def test_a_fetch_that_waits_in_vain_comes_back_empty(tmp_path: Path) -> None:
    async with broker(tmp_path / "log") as address, Client(address) as bus:
        assert await bus.fetch(0, wait_s=0.05) == ([], 0, 0)
        assert await bus.fetch(7) == ([], 7, 0)


async def test_a_port_in_use_is_said_so(tmp_path: Path) -> None:
    async with broker(tmp_path / "one") as address:
        with pytest.raises(ExceptionGroup) as failure:
            async with broker(tmp_path / "two", bind=address):
                raise AssertionError("it must not start")
        assert failure.group_contains(CallError, match="Stop the process that uses it")


async def test_a_second_broker_on_one_log_is_refused(tmp_path: Path) -> None:
    with BrokerProcess(tmp_path / "log"):
        with pytest.raises(ExceptionGroup) as failure:
            async with broker(tmp_path / "log"):
                raise AssertionError("it must not start")
        assert failure.group_contains(Conflict, match="another broker")


async def test_a_client_of_another_version_raises_what_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with BrokerProcess(tmp_path / "log") as process:
        monkeypatch.setattr(wire, "PROTOCOL_VERSION", 2)
        with pytest.raises(VersionError, match="Install the same lightning-bus on both sides"):
            async with Client(process.address, limit_s=PATIENCE_S):
                raise AssertionError("versions differ")


async def test_a_broker_that_is_not_there_is_named_with_the_limit() -> None:
    with pytest.raises(BrokenError, match=r"tcp://127.0.0.1:9 did not answer HELLO within 0.2 s.*lightning-bus broker"):
        async with Client("tcp://127.0.0.1:9", limit_s=0.2):
            raise AssertionError("nobody is there")


async def test_a_published_version_survives_a_restart(tmp_path: Path) -> None:
    async with broker(tmp_path / "log") as address, Client(address) as bus:
        await bus.put(Resource("weights", 1, b"one"))
    async with broker(tmp_path / "log") as address, Client(address) as bus:
        assert await bus.get("weights") == Resource("weights", 1, b"one")
        with pytest.raises(Conflict, match="weights version 1"):
            await bus.put(Resource("weights", 1, b"two"))


async def test_a_client_that_was_early_is_one_client(tmp_path: Path) -> None:
    """It knocked several times before the broker was up; each HELLO must not fence the one before."""
    process = BrokerProcess(tmp_path / "log")
    process.start()
    address = process.address
    process.kill()
    with RawPeer(address) as peer:
        hello = wire.encode(m.Hello("raw", nonce=b"n"), request=1, producer="raw")
        welcome = m.Welcome(1, 0, m.MESSAGE_BYTES_MAX, PATIENCE_S, 0, append_batches_max=m.APPEND_BATCHES_MAX)
        for _ in range(3):
            peer.send(hello)
        with process:
            assert {(await peer.receive()).body for _ in range(3)} == {welcome}
            answer = await peer.ask(m.Append([m.Part("", 0, 1)]), [b"x"], request=2, epoch=1, seq=1)
            assert isinstance(answer.body, m.Acked)


# -- bundles


async def test_a_bundle_is_handled_as_if_its_messages_had_come_alone(tmp_path: Path) -> None:
    """One of them is unreadable and one is refused; that is told to these two, and the others are done."""
    bundle = m.Bundle(
        [
            m.Bundled(m.Op.SUBMIT, msgspec.Raw(msgspec.msgpack.encode(m.Submit([Submission("r-1", b"")]))), request=1),
            m.Bundled(m.Op.SUBMIT, msgspec.Raw(b"\xc0"), request=2),
            m.Bundled(m.Op.CANCEL, msgspec.Raw(msgspec.msgpack.encode(m.Cancel(["r-2"]))), request=3),
            m.Bundled(m.Op.SUBMIT, msgspec.Raw(msgspec.msgpack.encode(m.Submit([Submission("r-3", b"")]))), request=4),
        ]
    )
    async with broker(tmp_path / "log") as address:
        with RawPeer(address) as peer:
            peer.send(wire.encode(bundle, producer="raw"))
            told: dict[int, m.Body] = {}
            for _ in range(4):
                message = await peer.receive()
                told[message.header.request] = message.body
    codes = {request: body.code for request, body in told.items() if isinstance(body, m.Error)}
    assert codes == {2: "RemoteProtocolError", 3: "NotFound"}
    assert (told[1], told[4]) == (m.Accepted(1), m.Accepted(1))
    with LogReader(tmp_path / "log") as reader:
        assert [rollout.submission.rollout_id for rollout in reader.rollouts()] == ["r-1", "r-3"]


async def test_answers_of_one_commit_leave_as_one_message(tmp_path: Path) -> None:
    bundle = m.Bundle([m.Bundled(m.Op.STATUS, msgspec.Raw(b"\x90"), request=n) for n in range(1, 11)])
    async with broker(tmp_path / "log") as address:
        with RawPeer(address) as peer:
            answer = await peer.ask_frames(wire.encode(bundle, producer="raw"))
            assert answer.header.request == 1
            assert [message.header.request for message in peer.inbox] == list(range(2, 11))


# -- bounds


async def test_a_peer_that_is_never_readable_is_ignored_and_others_are_not(tmp_path: Path) -> None:
    async with broker(tmp_path / "log") as address:
        with RawPeer(address, "garbler") as garbler:
            for _ in range(UNREADABLE_MAX):
                assert isinstance((await garbler.ask_frames([b"", b""])).body, m.Error)
            garbler.send([b"", b""])
            async with Client(address) as bus:
                status = await bus.status()  # comes after it
            assert status.refused["RemoteProtocolError"] == UNREADABLE_MAX


async def test_a_reader_that_asks_for_more_than_it_may_is_told_to_come_back(tmp_path: Path) -> None:
    async with broker(tmp_path / "log") as address:
        with RawPeer(address) as peer:
            for request in range(1, WAITING_PEER_MAX + 1):
                peer.send(wire.encode(m.Fetch(0, wait_ms=30_000), request=request, producer="raw"))
            answer = await peer.ask(m.Fetch(0, wait_ms=30_000), request=WAITING_PEER_MAX + 1)
            assert isinstance(answer.body, m.Error)
            assert (answer.body.code, answer.body.retry_after_s) == ("BusyError", 1.0)
            again = await peer.ask(m.Fetch(0), request=1)  # takes the place of the first, and does not wait
            assert again.header.request == 1


async def test_above_the_high_mark_spans_are_told_to_come_back_and_heartbeats_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "BUSY_BYTES", -1)
    async with broker(tmp_path / "log") as address:
        with RawPeer(address) as peer:
            refused = (await peer.ask(m.Submit([Submission("r-1", b"")]), request=2)).body
            assert (
                isinstance(refused, m.Error) and refused.code == "BusyError" and "wait for the disk" in refused.message
            )
            assert (await peer.ask(m.Heartbeat(1), request=1)).body == m.Beat()


@pytest.mark.slow
async def test_memory_is_flat_under_a_reader_that_never_reads(tmp_path: Path) -> None:
    blob = b"x" * (7 << 20)
    with BrokerProcess(tmp_path / "log") as process:
        async with Client(process.address) as bus:
            for _ in range(8):
                await bus.append_blob("", 0, blob, 1)
            before_mb = process.anonymous_mb()
            context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
            flood = context.socket(zmq.DEALER)
            flood.setsockopt(zmq.IDENTITY, b"flood")
            flood.setsockopt(zmq.RCVHWM, 1)
            flood.setsockopt(zmq.RCVBUF, 4096)
            flood.connect(process.address)
            try:
                peak_mb = 0.0
                for request in range(2000):  # 14 GB, were they answered
                    fetch = wire.encode(m.Fetch(0, 7 << 20), request=request + 1, producer="flood")
                    with suppress(zmq.Again):  # it was cut off, and may not get through again
                        flood.send_multipart(fetch, zmq.NOBLOCK)
                    if request % 100 == 0:
                        await bus.append("", 0, [span()])
                        assert (await bus.fetch(8))[0]
                        peak_mb = max(peak_mb, process.anonymous_mb())
            finally:
                context.destroy(linger=0)
    assert peak_mb - before_mb < 512, (before_mb, peak_mb)  # a few answers that wait to leave: about 80


# -- the end


async def drained(
    tmp_path: Path, drain_s: float, scope: anyio.CancelScope, up: anyio.Event, address: list[str]
) -> None:
    """Serve until the scope is cancelled, as a signal does, and then until drained."""
    section = BrokerSection(bind="tcp://127.0.0.1:*", drain_s=drain_s)
    with scope:
        await serve_section(section, tmp_path / "log", up, address)


async def test_a_broker_that_is_told_to_stop_lets_workers_end_what_they_hold(tmp_path: Path) -> None:
    scope, up, address = anyio.CancelScope(), anyio.Event(), list[str]()
    with anyio.fail_after(PATIENCE_S):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(drained, tmp_path, 1000.0, scope, up, address)
            await up.wait()
            with RawPeer(address[0]) as worker, RawPeer(address[0], "submitter") as submitter:
                await submitter.ask(m.Submit([Submission("r-1", b""), Submission("r-2", b"")]), request=1)
                worker.send(wire.encode(m.Heartbeat(1), request=1, producer="raw"))
                told = [(await worker.receive()).body for _ in range(2)]
                (task,) = [body for body in told if isinstance(body, m.Task)]
                scope.cancel()
                refused = (await submitter.ask(m.Submit([Submission("r-3", b"")]), request=2)).body
                assert isinstance(refused, m.Error) and refused.code == "BusyError"
                assert (await worker.ask(m.Done(task.rollout_id, task.attempt, 1.0), request=2)).body == m.Accepted(1)
    with LogReader(tmp_path / "log") as reader:
        assert sorted(rollout.status.value for rollout in reader.rollouts()) == ["queued", "succeeded"]


async def test_a_broker_that_is_told_to_stop_waits_no_longer_than_drain_s(tmp_path: Path) -> None:
    scope, up, address = anyio.CancelScope(), anyio.Event(), list[str]()
    with anyio.fail_after(PATIENCE_S):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(drained, tmp_path, 0.2, scope, up, address)
            await up.wait()
            with RawPeer(address[0]) as worker:
                await worker.ask(m.Submit([Submission("r-1", b"")]), request=1)
                await worker.ask(m.Heartbeat(1), request=2)
                scope.cancel()
    with LogReader(tmp_path / "log") as reader:
        assert [rollout.status.value for rollout in reader.rollouts()] == ["leased"]


async def serve_section(section: BrokerSection, log: Path, up: anyio.Event, address: list[str]) -> None:
    def started(bound: str) -> None:
        address.append(bound)
        up.set()

    await server.serve_broker(section, log, SECRET, started=started)
