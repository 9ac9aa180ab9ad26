"""A client's conversation, against a broker that the test plays: what leaves when, and who hears which answer."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import anyio
import anyio.lowlevel
import pytest

from lightning_bus import messages as m
from lightning_bus import wire
from lightning_bus.client.session import Session
from lightning_bus.errors import BrokenError, BusyError, ClosedError, LightningBusError, NotFound, RemoteProtocolError
from lightning_bus.transport import Arrived, Router, bind_router

pytestmark = pytest.mark.anyio

PATIENCE_S = 60.0  # with what takes no time, on a machine that stands still for a while
WELCOME = m.Welcome(1, 0, m.MESSAGE_BYTES_MAX, 10.0, 0)


@dataclass
class Played:
    """The broker's end of one session."""

    router: Router
    session: Session
    peer: bytes = b""
    unread: list[Arrived] = field(default_factory=list[Arrived])
    heard: set[int] = field(default_factory=set[int])  # numbers of requests

    async def next(self, *, again: bool = False) -> list[wire.Message]:
        """Return what the next message that comes holds.

        again  it may be one that came before. On a slow machine anything may come again, above all the first HELLO;
               where that is not what a test is about, it is passed over.
        """
        while True:
            if not self.unread:
                self.unread = await self.router.receive()
            arrived = self.unread.pop(0)
            self.peer = arrived.identity
            messages = [inner for inner in wire.split(wire.decode(arrived.frames)) if isinstance(inner, wire.Message)]
            numbers = {message.header.request for message in messages} - {0}
            known = bool(numbers) and numbers <= self.heard
            self.heard |= numbers
            if not known or (again and not isinstance(messages[0].body, m.Hello)):
                return messages

    def say(self, *messages: wire.Packed) -> None:
        for frames in wire.join(messages):
            self.router.send([self.peer, *frames])


@asynccontextmanager
async def playing(limit_s: float = PATIENCE_S) -> AsyncGenerator[Played]:
    """Open a session with a broker that the test plays."""
    router, address = bind_router("tcp://127.0.0.1:*")
    with router:
        played = Played(router, Session(address, "test", limit_s))

        async def welcome() -> None:
            (hello,) = await played.next()
            played.say(wire.pack(WELCOME, request=hello.header.request))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(welcome)
            async with played.session:
                with anyio.fail_after(PATIENCE_S):
                    yield played


async def test_what_is_said_in_one_turn_leaves_as_one_message_in_order() -> None:
    async with playing() as broker:
        answers: list[int] = []

        async def ask(number: int) -> None:
            answers.append((await broker.session.ask(m.Done(f"r-{number}", 1), m.Accepted)).fresh)

        async with anyio.create_task_group() as tasks:
            for number in range(50):
                tasks.start_soon(ask, number)
            asked = await broker.next()
            assert [message.body for message in asked] == [m.Done(f"r-{number}", 1) for number in range(50)]
            broker.say(*(wire.pack(m.Accepted(n), request=message.header.request) for n, message in enumerate(asked)))
        assert sorted(answers) == list(range(50))


async def test_a_question_alone_is_sent_plain() -> None:
    async with playing() as broker, anyio.create_task_group() as tasks:
        tasks.start_soon(broker.session.ask, m.StatusQuery(), m.Accepted)
        message = None
        while message is None or isinstance(message.body, m.Hello):  # which may have been knocked more than once
            message = wire.decode((await broker.router.receive())[0].frames)
        assert isinstance(message.body, m.StatusQuery)
        broker.say(wire.pack(m.Accepted(), request=message.header.request))


async def test_an_answer_that_cannot_be_read_fails_its_own_request_only() -> None:
    async with playing() as broker:
        outcomes: dict[int, object] = {}

        async def ask(number: int) -> None:
            try:
                outcomes[number] = await broker.session.ask(m.Done("r", number), m.Accepted)
            except LightningBusError as exc:
                outcomes[number] = type(exc)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ask, 1)
            tasks.start_soon(ask, 2)
            first, second = await broker.next()
            garbled = wire.pack(m.Accepted(), request=first.header.request)._replace(payload=b"\xc0")
            broker.say(garbled, wire.pack(m.Accepted(7), request=second.header.request))
        assert outcomes == {1: RemoteProtocolError, 2: m.Accepted(7)}


async def test_what_is_not_answered_is_sent_again_in_one_message() -> None:
    async with playing() as broker, anyio.create_task_group() as tasks:
        for number in range(3):
            tasks.start_soon(
                lambda number: broker.session.ask(m.Done("r", number), m.Accepted, resend_s=0.05), number + 1
            )
        first, again = await broker.next(), await broker.next(again=True)
        assert [message.header for message in first] == [message.header for message in again]
        assert [message.body for message in again] == [m.Done("r", 1), m.Done("r", 2), m.Done("r", 3)]
        broker.say(*(wire.pack(m.Accepted(), request=message.header.request) for message in again))


async def test_a_busy_broker_is_asked_again_when_it_said_to_come_back() -> None:
    async with playing() as broker, anyio.create_task_group() as tasks:
        tasks.start_soon(broker.session.ask, m.Submit([]), m.Accepted)
        (first,) = await broker.next()
        broker.say(wire.pack(m.Error("BusyError", "full", 0.01), request=first.header.request))
        (second,) = await broker.next()
        assert second.body == first.body
        broker.say(wire.pack(m.Accepted(), request=second.header.request))


async def test_a_broker_that_stays_busy_beyond_the_limit_is_an_error() -> None:
    async with playing(limit_s=30.0) as broker, anyio.create_task_group() as tasks:

        async def answer() -> None:
            (asked,) = await broker.next()
            broker.say(wire.pack(m.Error("BusyError", "full", 60.0), request=asked.header.request))

        tasks.start_soon(answer)
        with pytest.raises(BusyError, match="full") as failure:
            await broker.session.ask(m.Submit([]), m.Accepted)
        assert failure.value.retry_after_s == 60.0


async def test_silence_beyond_the_limit_names_the_request() -> None:
    async with playing() as broker:
        with pytest.raises(BrokenError, match=r"did not answer STATUS within 0\.1 s"):
            await broker.session.ask(m.StatusQuery(), m.StatusIs, limit_s=0.1)


async def test_a_subscription_hears_every_answer_until_it_is_left() -> None:
    async with playing() as broker:
        heard: list[m.Body] = []
        done = anyio.Event()

        def on_message(message: wire.Message) -> None:
            heard.append(message.body)
            if len(heard) == 3:
                done.set()

        with broker.session.subscribe(m.Wait(["r-1"]), on_message):
            (wait,) = await broker.next()
            for number in range(3):
                broker.say(wire.pack(m.Ended([], number), request=wait.header.request))
            await done.wait()
        broker.say(wire.pack(m.Ended([], 99), request=wait.header.request))
        async with anyio.create_task_group() as tasks:  # what comes after it in order has come, so that has too
            tasks.start_soon(broker.session.ask, m.StatusQuery(), m.Accepted)
            (status,) = await broker.next()
            broker.say(wire.pack(m.Accepted(), request=status.header.request))
        assert heard == [m.Ended([], 0), m.Ended([], 1), m.Ended([], 2)]


async def test_a_subscription_is_sent_again_until_its_first_answer() -> None:
    async with playing() as broker:
        heard = anyio.Event()
        with broker.session.subscribe(m.Wait(["r-1"]), lambda _: heard.set(), resend_s=0.02):
            first, again = await broker.next(), await broker.next(again=True)
            assert first == again
            broker.say(wire.pack(m.Ended([], 1), request=again[0].header.request))
            await heard.wait()


async def test_a_subscription_is_told_why_it_was_refused_and_that_the_client_was_closed() -> None:
    errors: list[LightningBusError] = []
    refused = anyio.Event()

    def on_error(error: LightningBusError) -> None:
        errors.append(error)
        refused.set()

    async with playing() as broker:
        subscription = broker.session.subscribe(m.Wait(["r-1"]), lambda _: None, on_error)
        subscription.__enter__()
        (wait,) = await broker.next()
        broker.say(wire.pack(m.Error("NotFound", "no rollout r-1"), request=wait.header.request))
        await refused.wait()
    subscription.__exit__(None, None, None)
    assert [type(error) for error in errors] == [NotFound, ClosedError]


async def test_what_was_said_last_still_leaves_when_the_session_closes() -> None:
    router, address = bind_router("tcp://127.0.0.1:*")
    with router, anyio.fail_after(PATIENCE_S):
        played = Played(router, Session(address, "test", PATIENCE_S))

        async def converse() -> None:
            async with played.session as session:
                session.tell(m.Heartbeat(0))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(converse)
            (hello,) = await played.next()
            played.say(wire.pack(WELCOME, request=hello.header.request))
            while True:  # HELLO may have been knocked more than once
                (message,) = await played.next()
                if not isinstance(message.body, m.Hello):
                    break
        assert message.body == m.Heartbeat(0)


async def test_a_request_that_is_cancelled_leaves_nothing_behind() -> None:
    async with playing() as broker:
        with anyio.CancelScope() as scope:
            scope.cancel()
            await broker.session.ask(m.StatusQuery(), m.StatusIs)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(broker.session.ask, m.StatusQuery(), m.Accepted)
            for _ in range(2):  # the one that nobody waits for had left already
                (asked,) = await broker.next()
                broker.say(wire.pack(m.Accepted(), request=asked.header.request))
        assert not broker.session._pending  # pyright: ignore[reportPrivateUsage]
