"""Regressions that seeds have found, told as stories, most of them of what a network may do to one client.

The client is the real one; the broker is the test, which answers when and what it likes.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Coroutine, Iterator
from typing import Any
from unittest import mock

import anyio
import pytest

from lightning_bus import messages as m
from lightning_bus import wire
from lightning_bus.client import Client
from lightning_bus.client import session as session_module
from lightning_bus.errors import RemoteProtocolError
from lightning_bus.log.memory import MemoryLog
from lightning_bus.log.verify import verify_log
from lightning_bus.transport import Arrived
from tests.core_harness import Desk
from tests.simulation.network import Network, RouterChannel, Weather
from tests.simulation.virtual_time import run, virtual_loop


class Broker:
    """The test's side of the wire."""

    def __init__(self, router: RouterChannel) -> None:
        self._router = router
        self._waiting: list[Arrived] = []

    async def hears(self, kind: type[m.Body]) -> wire.Message:
        """Return the next message of that kind, leaving out others."""
        while True:
            while self._waiting:
                self.peer, _, frames, _ = self._waiting.pop(0)
                message = wire.decode(frames)
                if isinstance(message.body, kind):
                    return message
            self._waiting = await self._router.receive()

    def says(self, body: m.Body, request: int = 0) -> None:
        self._router.send([self.peer, *wire.encode(body, request=request)])


def play(
    broker_side: Callable[[Broker], Coroutine[Any, Any, None]],
    client_side: Callable[[Client], Coroutine[Any, Any, None]],
) -> None:
    """Tell both sides of a story on virtual time."""
    with virtual_loop() as loop:
        network = Network(loop, random.Random(1), Weather(), None)

        async def client() -> None:
            async with Client("sim://broker", limit_s=30.0) as bus:
                await client_side(bus)

        async def main() -> None:
            router = network.bind()
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(broker_side, Broker(router))
                tasks.start_soon(client)

        with mock.patch.object(session_module, "connect_dealer", network.connect):
            run(loop, main)


def test_a_task_that_arrives_again_after_its_attempt_was_lost_is_not_run_again() -> None:
    """Its DONE was recorded, the answer was not heard; a second DONE would be accepted, and its spans dropped."""
    task = m.Task("r-1", 1, b"", "", 10.0)

    async def broker_side(broker: Broker) -> None:
        hello = await broker.hears(m.Hello)
        broker.says(m.Welcome(1, 0, m.MESSAGE_BYTES_MAX, 10.0, 0), hello.header.request)
        await broker.hears(m.Heartbeat)
        broker.says(task)
        done = await broker.hears(m.Done)
        beat = await broker.hears(m.Heartbeat)
        broker.says(m.Beat([m.Held("r-1", 1)]), beat.header.request)
        broker.says(task)  # late: it was sent before the attempt ended
        await anyio.sleep(0.5)
        broker.says(m.Accepted(0), done.header.request)

    async def client_side(bus: Client) -> None:
        async with bus.lease(1) as leases, anyio.create_task_group() as tasks:
            tasks.start_soon(leases.done, await anext(leases), 1.0)
            with anyio.move_on_after(10.0):
                raise AssertionError(f"it came again: {await anext(leases)}")

    play(broker_side, client_side)


def test_the_number_of_a_batch_whose_fate_is_unknown_is_never_given_to_another() -> None:
    """A copy of the first batch that arrives late would make the second one a resend, acknowledged and not kept."""
    desk = Desk()

    async def broker_side(broker: Broker) -> None:
        def take(message: wire.Message) -> m.Body:
            header = message.header
            return desk.say(header.producer, message.body, message.blobs, epoch=header.epoch, seq=header.seq, count=1)

        async def answer(kind: type[m.Body]) -> None:
            message = await broker.hears(kind)
            broker.says(take(message), message.header.request)

        await answer(m.Hello)
        late = await broker.hears(m.Append)  # still under way, as far as the broker knows
        broker.says(m.Error("RemoteProtocolError", "something could not be read"))
        await answer(m.Hello)
        take(late)
        await answer(m.Append)

    async def client_side(bus: Client) -> None:
        with pytest.raises(RemoteProtocolError):
            await bus.append_blob("", 0, b"first", 1)
        await bus.append_blob("", 0, b"second", 1)
        assert b"second" in [record.body for record in desk.log.records], "acknowledged, so it is kept"

    play(broker_side, client_side)


def test_an_answer_to_a_former_bearer_of_our_name_is_not_taken_for_ours() -> None:
    """A process that is started again under its name would else take "it is durable" for what was never sent."""

    async def broker_side(broker: Broker) -> None:
        hello = await broker.hears(m.Hello)
        broker.says(m.Welcome(2, 0, m.MESSAGE_BYTES_MAX, 10.0, 0), hello.header.request)
        submit = await broker.hears(m.Submit)
        for request in range(1, 20):
            broker.says(m.Accepted(7), request)
        await anyio.sleep(0.5)
        broker.says(m.Accepted(1), submit.header.request)

    async def client_side(bus: Client) -> None:
        assert (await bus.submit([m.Submission("r-1", b"")])).fresh == 1

    play(broker_side, client_side)


def test_a_cursor_is_kept_even_at_the_beginning_of_the_log() -> None:
    """Else a reader could not ask retention to wait for it before it has read something."""
    desk = Desk()
    desk.submit("r-1")
    assert desk.say("t", m.Commit("c", 0)) == m.CursorAt("c", 0)
    assert desk.restored().cursors == {"c": 0}
    assert desk.say("t", m.Commit("c", 0)) == m.CursorAt("c", 0)
    assert not desk.last.writes, "sent again, it is no news"


def test_a_log_is_verified_whose_dead_letter_was_replayed_after_its_end_was_dropped() -> None:
    log = MemoryLog(segment_bytes=1)  # a segment a transaction
    desk = Desk()
    desk.leased("r-1")
    desk.say("w", m.Fail("r-1", 1, "boom", retryable=False))
    end_offset = len(desk.log.records)
    desk.say("t", m.Replay(["r-1"]))
    desk.say("t", m.Cancel(["r-1.r1"]))
    for record in desk.log.records:
        log.commit([record])
    assert log.drop_before(end_offset) == end_offset
    assert [check.first for check in verify_log(Kept(log)).checks if not check.proved] == []


class Kept:
    """A log in memory, as `verify` reads it."""

    def __init__(self, log: MemoryLog) -> None:
        self.first_offset = log.first_offset
        self.end_offset = log.end_offset
        self._log = log

    def values(self) -> Iterator[bytes]:
        for offset in range(self.first_offset, self.end_offset):
            yield self._log.read(offset, 1)[0][0]
