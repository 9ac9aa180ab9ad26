"""The broker behind its socket: what any peer may send it, and that an answer means what it says."""

from __future__ import annotations

from pathlib import Path

import anyio
import msgspec
import pytest

from lightning_bus import Client, Resource, Submission, wire
from lightning_bus import messages as m
from lightning_bus.errors import BrokenError, CallError, Conflict, VersionError
from lightning_bus.log.store import LogReader
from tests.bus_fixtures import BrokerProcess, RawPeer, broker, span

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
                assert await bus.submit([Submission("r-1", b"")]) == 1


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
                with anyio.fail_after(10):  # a third of the wait
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
            async with Client(process.address, limit_s=20):
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
        for _ in range(3):
            peer.send(hello)
        with process:
            assert {(await peer.receive()).body for _ in range(3)} == {m.Welcome(1, 0, m.MESSAGE_BYTES_MAX, 10.0, 0)}
            answer = await peer.ask(m.Append([m.Part("", 0, 1)]), [b"x"], request=2, epoch=1, seq=1)
            assert isinstance(answer.body, m.Acked)
