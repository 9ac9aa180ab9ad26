"""The spool before a scripted broker: several batches on the way, answered in any order, or not taken at all."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from typing import Any, cast

import anyio
import pytest

from lightning_bus import messages as m
from lightning_bus import wire
from lightning_bus.client import spool as spool_module
from lightning_bus.client.session import Session
from lightning_bus.client.spool import Spool
from lightning_bus.errors import AccessDenied, BrokenError, FencedError, LightningBusError, RemoteProtocolError

pytestmark = pytest.mark.anyio
FULL = b"x" * spool_module.FULL_BYTES  # a batch of its own
WINDOW = 4


class Asked:
    """One APPEND that was sent, waiting for what the test answers."""

    def __init__(self, seq: int, epoch: int, blobs: Sequence[bytes]) -> None:
        self.seq, self.epoch, self.blobs = seq, epoch, list(blobs)
        self._answered = anyio.Event()
        self._answer: m.Body | LightningBusError | None = None

    async def answer(self, answer: m.Body | LightningBusError) -> None:
        self._answer = answer
        self._answered.set()
        await anyio.wait_all_tasks_blocked()

    async def wait(self) -> m.Body:
        await self._answered.wait()
        assert self._answer is not None
        if isinstance(self._answer, LightningBusError):
            raise self._answer
        return self._answer


class ScriptedSession:
    """Stands for `Session`: keeps what is asked, and the test answers."""

    address, producer, limit_s = "tcp://scripted", "client-1", 30.0

    def __init__(self) -> None:
        self.welcome = m.Welcome(1, 0, 1 << 24, 10.0, 0, append_batches_max=WINDOW)
        self.asked: list[Asked] = []
        self.greetings = 0
        self.greeting_error: LightningBusError | None = None

    def open_channel(self) -> None:
        pass

    async def exchange(
        self, body: m.Append, blobs: Sequence[bytes], *, seq: int, count: int, limit_s: float
    ) -> wire.Message:
        assert limit_s == float("inf") and count == sum(part.count for part in body.parts)
        asked = Asked(seq, self.welcome.epoch, blobs)
        self.asked.append(asked)
        return wire.Message(m.Header(1, m.Op.ACKED), await asked.wait(), [])

    async def greet_again(self) -> m.Welcome:
        self.greetings += 1
        if self.greeting_error is not None:
            raise self.greeting_error
        self.welcome = m.Welcome(self.welcome.epoch + 1, 0, 1 << 24, 10.0, 0, append_batches_max=WINDOW)
        return self.welcome

    @property
    def sent(self) -> list[tuple[int, int]]:
        return [(asked.epoch, asked.seq) for asked in self.asked]


class Producers:
    """Callers of `append`, and what came of each."""

    def __init__(self, spool: Spool, session: ScriptedSession, tasks: Any) -> None:
        self.session = session
        self.outcomes: dict[str, str] = {}
        self._spool = spool
        self._tasks = tasks

    async def append(self, name: str, blob: bytes = FULL) -> None:
        self._tasks.start_soon(self._append, name, blob)
        await anyio.wait_all_tasks_blocked()

    async def _append(self, name: str, blob: bytes) -> None:
        try:
            await self._spool.append(m.Part(name, 1, 1), blob)
            self.outcomes[name] = "kept"
        except LightningBusError as exc:
            self.outcomes[name] = type(exc).__name__


@asynccontextmanager
async def producers() -> AsyncGenerator[Producers]:
    session = ScriptedSession()
    spool = Spool(cast(Session, session))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(spool.flush_for_ever)
        yield Producers(spool, session, tasks)
        tasks.cancel_scope.cancel()


async def test_full_batches_go_while_others_are_on_their_way_and_are_answered_in_any_order() -> None:
    async with producers() as p:
        for name in ("a", "b", "c"):
            await p.append(name)
        assert p.session.sent == [(1, 1), (1, 2), (1, 3)]
        for number, name in ((2, "c"), (0, "a"), (1, "b")):
            await p.session.asked[number].answer(m.Acked(number))
            assert p.outcomes.pop(name) == "kept"


async def test_a_little_waits_for_company_while_something_is_on_its_way() -> None:
    async with producers() as p:
        for name in ("a", "b", "c"):
            await p.append(name, b"small")
        assert p.session.sent == [(1, 1)]
        await p.session.asked[0].answer(m.Acked(1))
        assert p.session.sent == [(1, 1), (1, 2)] and len(p.session.asked[1].blobs) == 2
        await p.session.asked[1].answer(m.Acked(3, fenced=[1]))
        assert p.outcomes == {"a": "kept", "b": "kept", "c": "FencedError"}


async def test_no_batch_goes_further_ahead_than_the_broker_remembers_verdicts() -> None:
    async with producers() as p:
        for number in range(WINDOW + 2):
            await p.append(str(number))
        for number in range(1, WINDOW):  # all but the first
            await p.session.asked[number].answer(m.Acked(number))
        assert p.session.sent == [(1, seq) for seq in range(1, WINDOW + 1)]
        await p.session.asked[0].answer(m.Acked(0))
        assert p.session.sent[WINDOW:] == [(1, WINDOW + 1), (1, WINDOW + 2)]  # both that waited


async def test_the_bytes_on_the_way_are_bounded() -> None:
    async with producers() as p:
        p.session.welcome = m.Welcome(
            1, 0, 1 << 24, 10.0, 0, append_bytes_max=int(2.5 * len(FULL)), append_batches_max=WINDOW
        )
        for number in range(WINDOW):
            await p.append(str(number))
        assert p.session.sent == [(1, 1), (1, 2)]


async def test_a_gap_closes_from_its_lower_end() -> None:
    async with producers() as p:
        for name in ("a", "b", "c"):
            await p.append(name)
        first, second, third = p.session.asked
        await second.answer(m.Resync(1, 0))  # the first was lost
        assert p.session.sent[3:] == [(1, 1)]
        await third.answer(m.Resync(1, 0))
        assert p.session.sent[3:] == [(1, 1)]  # hurried once
        await first.answer(m.Acked(1))  # to the copy that was given up; nobody listens
        assert p.outcomes == {}
        await p.session.asked[3].answer(m.Acked(1, duplicate=True))
        await p.session.asked[4].answer(m.Acked(2))
        await p.session.asked[5].answer(m.Acked(3))
        assert p.session.sent[3:] == [(1, 1), (1, 2), (1, 3)]
        assert p.outcomes == {"a": "kept", "b": "kept", "c": "kept"}


async def test_a_refused_batch_ends_the_epoch_and_takes_those_after_it_along_but_not_those_before() -> None:
    async with producers() as p:
        for name in ("a", "b", "c"):
            await p.append(name)
        await p.session.asked[1].answer(AccessDenied("not yours"))
        assert p.outcomes == {"b": "AccessDenied", "c": "BrokenError"}
        await p.append("d")
        assert p.session.greetings == 0  # the first may still be taken, and its caller told so
        await p.session.asked[0].answer(m.Acked(1))
        assert p.outcomes["a"] == "kept" and p.session.greetings == 1
        assert p.session.sent == [(1, 1), (1, 2), (1, 3), (2, 1)]
        await p.session.asked[3].answer(m.Acked(2))
        assert p.outcomes["d"] == "kept"


async def test_a_broker_that_forgot_what_it_acknowledged_is_not_believed() -> None:
    async with producers() as p:
        await p.append("a")
        await p.session.asked[0].answer(m.Acked(1))
        await p.append("b")
        await p.session.asked[1].answer(m.Resync(1, 0))
        assert p.outcomes == {"a": "kept", "b": RemoteProtocolError.__name__}
        await p.append("c")
        assert p.session.sent[2:] == [(2, 1)]


async def test_a_session_that_is_over_says_so_to_everyone_and_asks_again_only_for_more() -> None:
    async with producers() as p:
        p.session.greeting_error = FencedError("this session is over")
        await p.append("a")
        await p.append("b", b"waits")
        await p.session.asked[0].answer(FencedError("this session is over"))
        assert p.outcomes == {"a": "FencedError", "b": "FencedError"}
        assert p.session.greetings == 1
        await p.append("c")
        assert p.outcomes["c"] == "FencedError" and p.session.greetings == 2


async def test_a_spool_that_is_full_holds_its_callers_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool_module, "SPOOL_BYTES_MAX", 10)
    async with producers() as p:
        await p.append("a", b"on its way")
        await p.append("b", b"12 bytes....")
        await p.append("c", b"held back")
        assert p._spool._waiting_bytes == 12  # pyright: ignore[reportPrivateUsage]
        await p.session.asked[0].answer(m.Acked(1))
        await p.session.asked[1].answer(m.Acked(2))
        await p.session.asked[2].answer(m.Acked(3))
        assert p.outcomes == {"a": "kept", "b": "kept", "c": "kept"}


async def test_who_waits_longer_than_the_limit_is_told_and_harms_no_other() -> None:
    async with producers() as p:
        p.session.limit_s = 0.05
        await p.append("a")
        with anyio.fail_after(60):
            while not p.outcomes:
                await anyio.lowlevel.checkpoint()
        assert p.outcomes == {"a": BrokenError.__name__}
        await p.session.asked[0].answer(m.Acked(1))
        p.session.limit_s = 30.0
        await p.append("b")
        await p.session.asked[1].answer(m.Acked(2))
        assert p.outcomes["b"] == "kept"
