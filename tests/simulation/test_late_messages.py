"""What a network may do to one client, in a row of its own: regressions that seeds have found, told as stories.

The client is the real one; the broker is the test, which answers when and what it likes.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Coroutine
from typing import Any
from unittest import mock

import anyio
import pytest

from lightning_bus import messages as m
from lightning_bus import wire
from lightning_bus.client import Client
from lightning_bus.client import session as session_module
from lightning_bus.errors import RemoteProtocolError
from tests.core_harness import Desk
from tests.simulation.network import Network, RouterChannel, Weather
from tests.simulation.virtual_time import run, virtual_loop


class Broker:
    """The test's side of the wire."""

    def __init__(self, router: RouterChannel) -> None:
        self._router = router
        self._waiting: list[list[bytes]] = []

    async def hears(self, kind: type[m.Body]) -> wire.Message:
        """Return the next message of that kind, leaving out others."""
        while True:
            while self._waiting:
                self.peer, *frames = self._waiting.pop(0)
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
