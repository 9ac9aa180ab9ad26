"""Bugs in what is around the decisions: the broker's loop, its committer, its housekeeping, and the client's side."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any
from unittest import mock

from lightning_bus import messages as m
from lightning_bus import wire
from lightning_bus.broker import core, housekeeping
from lightning_bus.client.spool import Spool
from lightning_bus.errors import StorageError
from lightning_bus.records import Write
from lightning_bus.transport import Arrived
from tests.simulation.brokers import SimulatedServer
from tests.simulation.planting import bug


class Hasty(SimulatedServer):
    """Sends at once what should wait for the commit."""

    hastens: type[m.Body] = m.Body

    def _decide(self, effects: core.Effects, size: int) -> None:
        now = [send for send in effects.sends if isinstance(send.body, self.hastens)]
        effects.sends = [send for send in effects.sends if not isinstance(send.body, self.hastens)]
        for send in now:
            self._send(send.peer.encode(), send)
        super()._decide(effects, size)


@bug("is on disk", seeds_max=10)
def ack_before_commit() -> Generator[type[SimulatedServer] | None]:
    yield type("Server", (Hasty,), {"hastens": m.Acked})


@bug("is on disk", "stands", seeds_max=10)
def accept_before_commit() -> Generator[type[SimulatedServer] | None]:
    yield type("Server", (Hasty,), {"hastens": m.Accepted})


@bug("before it is sent", seeds_max=5)
def task_before_commit() -> Generator[type[SimulatedServer] | None]:
    yield type("Server", (Hasty,), {"hastens": m.Task})


@bug("only what is on disk is told", seeds_max=200)
def query_before_commit() -> Generator[type[SimulatedServer] | None]:
    yield type("Server", (Hasty,), {"hastens": m.Rollouts})


@bug("only what is on disk is told", seeds_max=20)
def end_told_before_commit() -> Generator[type[SimulatedServer] | None]:
    yield type("Server", (Hasty,), {"hastens": m.Ended})


@bug("an acknowledged resource is on disk", seeds_max=60)
def version_told_before_commit() -> Generator[type[SimulatedServer] | None]:
    yield type("Server", (Hasty,), {"hastens": m.ResourceIs})


@bug("is on disk", "is due", seeds_max=200)
def go_on_after_a_failed_commit() -> Generator[type[SimulatedServer] | None]:
    class Deaf(SimulatedServer):
        async def commit(self, writes: list[Write]) -> None:
            try:
                await super().commit(writes)
            except StorageError:
                self.brokers.count("nobody noticed")

    yield Deaf


@bug("state and data agree", seeds_max=5)
def result_and_its_spans_in_two_transactions() -> Generator[type[SimulatedServer] | None]:
    class Halving(SimulatedServer):
        async def commit(self, writes: list[Write]) -> None:
            half = len(writes) // 2
            await super().commit(writes[:half])
            await super().commit(writes[half:])

    yield Halving


@bug("is on disk", seeds_max=60)
def bundle_answered_as_a_whole() -> Generator[type[SimulatedServer] | None]:
    """What holds for the first batch of a bundle is told of all of them."""

    class Sweeping(SimulatedServer):
        def _on_arrived(self, arrived: Arrived) -> None:
            self._told: m.Acked | None = None
            super()._on_arrived(arrived)

        def _on_message(self, peer: str, message: wire.Message, role: str, size: int, now_s: float) -> bool:
            if self._told is not None and isinstance(message.body, m.Append):
                self._decide(core.Effects([], [core.Send(peer, message.header.request, self._told)]), size)
                return True
            decided = super()._on_message(peer, message, role, size, now_s)
            told = [send.body for send in self._group.sends if isinstance(send.body, m.Acked)]
            self._told = told[-1] if told else None
            return decided

    yield Sweeping


@bug("is on disk", "filed as sent", "appended twice", "never recorded", "order per producer", seeds_max=60)
def blobs_of_a_bundle_mixed_up() -> Generator[None]:
    def split(message: wire.Message) -> Any:
        blobs = message.blobs
        return [
            found if isinstance(found, wire.Unreadable) else found._replace(blobs=blobs[: len(found.blobs)])
            for found in real(message)
        ]

    real = wire.split
    with mock.patch.object(wire, "split", split):
        yield


@bug("a reader never skips", seeds_max=20)
def reader_sent_past_a_record() -> Generator[type[SimulatedServer] | None]:
    class Skipping(SimulatedServer):
        def _answer_fetch(self, peer: str, request: int, body: m.Body, values: list[bytes]) -> bool:
            if isinstance(body, m.Chunk) and len(values) > 1:
                values = values[1:]
            return super()._answer_fetch(peer, request, body, values)

    yield Skipping


@bug("retention keeps what a cursor has to read", seeds_max=200)
def retention_looks_at_no_cursor() -> Generator[None]:
    def droppable(segments: Any, cursors: Any, policy: Any, wall_ns: int) -> int | None:
        return real(segments, {}, policy, wall_ns)

    real = housekeeping.droppable
    with mock.patch.object(housekeeping, "droppable", droppable):
        yield


@bug("only old rollouts are forgotten", seeds_max=200)
def retention_forgets_too_much() -> Generator[None]:
    def forget(state: core.BrokerState, first_offset: int) -> core.Effects:
        return real(state, first_offset + 20 if first_offset else 0)

    real = core.forget
    with mock.patch.object(core, "forget", forget):
        yield


# -- the client's side --------------------------------------------------------------------------------------------


@bug("is on disk", "appended twice", "order per producer", seeds_max=100)
def a_number_is_given_to_another_batch() -> Generator[None]:
    """After a batch whose fate is unknown the numbers go on from it, in the same epoch."""

    async def begin_epoch(spool: Any) -> None:
        spool._seq = spool._failed.seq - 1
        spool._failed = None

    with mock.patch.object(Spool, "_begin_epoch", begin_epoch):
        yield
