"""Real sockets: nothing that was received is lost, whatever is cancelled, and what cannot be sent is said so."""

from __future__ import annotations

import random

import anyio
import anyio.lowlevel
import pytest

from lightning_bus.errors import CallError, ClosedError
from lightning_bus.transport import bind_router, connect_dealer

pytestmark = pytest.mark.anyio

COUNT = 3000


async def send(channel: object, frames: list[bytes]) -> None:
    while not channel.send(frames):  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]
        await anyio.lowlevel.checkpoint()


async def test_cancellation_storms_lose_no_message_and_keep_the_order() -> None:
    got: list[int] = []
    cancelled = 0
    dice = random.Random(1)
    router, address = bind_router("tcp://127.0.0.1:*")
    with router, connect_dealer(address, "peer") as dealer:

        async def produce() -> None:
            for number in range(COUNT):
                await send(dealer, [number.to_bytes(4, "big")])
                if number % 3 == 0:
                    await anyio.lowlevel.checkpoint()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(produce)
            while len(got) < COUNT:
                with anyio.move_on_after(dice.choice([0, 0, 1e-5, 1e-4])) as scope:
                    got += [int.from_bytes(arrived.frames[0], "big") for arrived in await router.receive()]
                cancelled += scope.cancelled_caught
    assert got == list(range(COUNT))
    assert cancelled > 10


async def test_a_send_does_not_swallow_what_wakes_a_sleeping_reader() -> None:
    """`zmq.FD` is edge-triggered: two sides that send all the time would otherwise stop reading sooner or later."""
    router, address = bind_router("tcp://127.0.0.1:*")
    seen = {"router": 0, "dealer": 0}
    with router, connect_dealer(address, "peer") as dealer, anyio.fail_after(60):

        async def flood() -> None:
            for number in range(COUNT):
                await send(dealer, [b"to the router"])
                if number % 7 == 0:
                    await anyio.lowlevel.checkpoint()

        async def read_router() -> None:
            while seen["router"] < COUNT:
                for _ in await router.receive():
                    seen["router"] += 1
                    assert router.send([b"peer", b"back"])

        async def read_dealer() -> None:
            while seen["dealer"] < COUNT:
                seen["dealer"] += len(await dealer.receive())

        async with anyio.create_task_group() as tasks:
            for task in (flood, read_router, read_dealer):
                tasks.start_soon(task)
    assert seen == {"router": COUNT, "dealer": COUNT}


async def test_a_router_says_when_a_peer_cannot_be_reached() -> None:
    router, _ = bind_router("tcp://127.0.0.1:*")
    with router:
        assert router.send([b"nobody", b"hello"]) is False


async def test_a_dealer_says_when_nobody_is_connected_and_piles_nothing_up() -> None:
    with connect_dealer("tcp://127.0.0.1:9", "peer") as dealer:
        assert dealer.send([b"hello"]) is False


async def test_a_peer_that_comes_back_under_its_name_takes_over() -> None:
    router, address = bind_router("tcp://127.0.0.1:*")
    with router, connect_dealer(address, "peer") as old:
        await send(old, [b"old"])
        await router.receive()
        with connect_dealer(address, "peer") as new:
            await send(new, [b"new"])
            await router.receive()
            assert router.send([b"peer", b"answer"])
            with anyio.fail_after(60):
                assert await new.receive() == [[b"answer"]]


async def test_a_taken_address_says_what_to_do() -> None:
    router, address = bind_router("tcp://127.0.0.1:*")
    with (
        router,
        pytest.raises(CallError, match=rf"{address}.*Stop the process that uses it, or choose another address"),
    ):
        bind_router(address)


@pytest.mark.parametrize("address", ["127.0.0.1:4750", "tcp//x", "tcp://", ""])
async def test_what_is_no_address_is_said_so(address: str) -> None:
    with pytest.raises(CallError, match="Example: tcp://127.0.0.1:4750"):
        connect_dealer(address, "peer")


async def test_a_closed_channel_says_so() -> None:
    router, _ = bind_router("tcp://127.0.0.1:*")
    router.close()
    router.close()
    with pytest.raises(ClosedError):
        router.send([b"x"])
    with pytest.raises(ClosedError):
        await router.receive()
