"""Bugs to plant: for each promise, a broker that breaks it. A simulator that does not find them proves nothing.

Each is what somebody could write: a line forgotten, two lines exchanged. They are put over the real broker from
outside; `catch` plays seeds until the oracle objects.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import msgspec

from lightning_bus import lifecycle
from lightning_bus import messages as m
from lightning_bus.broker import core
from lightning_bus.errors import StorageError
from lightning_bus.lifecycle import Event, Status
from lightning_bus.records import Put, Record, Table, Write
from tests.simulation.brokers import SimulatedServer
from tests.simulation.oracle import Violation
from tests.simulation.world import simulate

Planting = Callable[[], Iterator[type[SimulatedServer] | None]]  # a generator that yields once, the bug being there


@dataclass(frozen=True, slots=True)
class Bug:
    """One bug. `promises` are what its discovery may be called; `seeds_max` is how many histories may pass unharmed."""

    name: str
    promises: tuple[str, ...]
    seeds_max: int
    planted: Callable[[], Any]  # a context manager; its value is the broker's loop to use, or None


BUGS: list[Bug] = []


def bug(*promises: str, seeds_max: int) -> Callable[[Planting], None]:
    def register(planting: Planting) -> None:
        BUGS.append(Bug(planting.__name__, promises, seeds_max, contextmanager(planting)))

    return register


def catch(bug: Bug) -> tuple[int, str]:
    """Return the first seed that finds the bug, and what the oracle said. Raises AssertionError when none does.

    The oracle sees the log and the clients only: that a broker's memory looks odd harms nobody yet.
    """
    with bug.planted() as server:
        for seed in range(bug.seeds_max):
            try:
                simulate(seed, server=server, look_inside=False)
            except Violation as exc:
                return seed, str(exc)
    raise AssertionError(f"{bug.name} went unnoticed for {bug.seeds_max} seeds")


# -- the broker's loop --------------------------------------------------------------------------------------------


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


@bug("is on disk", "offset", seeds_max=200)
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


# -- its decisions ------------------------------------------------------------------------------------------------


@bug("fenced results are never recorded", seeds_max=5)
def forgotten_fence_of_spans() -> Generator[None]:
    with mock.patch.object(core, "_is_running", lambda state, rollout_id, attempt: True):
        yield


@bug("only the holder reports", "never recorded", "appended twice", "filed as sent", seeds_max=20)
def forgotten_fence_of_results() -> Generator[None]:
    def must_hold(c: core.Context, rollout: m.Rollout, attempt: int) -> None:
        if rollout.status is not Status.LEASED:
            real(c, rollout, attempt)

    real = core._must_hold  # pyright: ignore[reportPrivateUsage]
    with mock.patch.object(core, "_must_hold", must_hold):
        yield


@bug("nothing is appended twice", "batches are in order", seeds_max=60)
def lost_dedup_mark() -> Generator[None]:
    """The mark of a batch is kept in memory only; a restart takes the first batch of an epoch again."""

    def handle(state: core.BrokerState, peer: str, header: m.Header, body: m.Body, *rest: Any, **named: Any) -> Any:
        effects = real(state, peer, header, body, *rest, **named)
        if isinstance(body, m.Append):
            effects.writes = [write for write in effects.writes if isinstance(write, Record)]
        return effects

    real = core.handle
    with mock.patch.object(core, "handle", handle):
        yield


@bug("nothing is appended twice", seeds_max=10)
def dedup_mark_not_looked_at() -> Generator[None]:
    def append(c: core.Context, body: m.Append) -> m.Body:
        mark = c.state.producers[c.peer]
        if (c.header.epoch, c.header.seq) == (mark.epoch, mark.seq):
            c.state.producers[c.peer] = msgspec.structs.replace(mark, seq=mark.seq - 1)
        return real(c, body)

    real = core._HANDLERS[m.Append]  # pyright: ignore[reportPrivateUsage]
    with _handler(m.Append, append):
        yield


@bug("a cursor never skips", seeds_max=5)
def cursor_skip() -> Generator[None]:
    def cursor(c: core.Context, body: m.Cursor) -> m.Body:
        if body.offset is not None and body.offset < c.state.next_offset:
            body = msgspec.structs.replace(body, offset=body.offset + 1)
        return real(c, body)

    real = core._HANDLERS[m.Cursor]  # pyright: ignore[reportPrivateUsage]
    with _handler(m.Cursor, cursor):
        yield


@bug("a cursor never goes back", seeds_max=60)
def cursor_goes_back() -> Generator[None]:
    def cursor(c: core.Context, body: m.Cursor) -> m.Body:
        if body.offset is not None:
            c.state.cursors[body.name] = 0
        return real(c, body)

    real = core._HANDLERS[m.Cursor]  # pyright: ignore[reportPrivateUsage]
    with _handler(m.Cursor, cursor):
        yield


@bug("state and data agree", seeds_max=5)
def attempt_number_not_persisted() -> Generator[None]:
    """The lease goes out, its number stays in memory."""

    def handle(*given: Any, **named: Any) -> core.Effects:
        return _without_leases(real_handle(*given, **named))

    def tick(*given: Any, **named: Any) -> core.Effects:
        return _without_leases(real_tick(*given, **named))

    real_handle, real_tick = core.handle, core.tick
    with mock.patch.object(core, "handle", handle), mock.patch.object(core, "tick", tick):
        yield


@bug("attempts are 1, 2", seeds_max=10)
def attempt_number_used_again() -> Generator[None]:
    def move(state: core.BrokerState, rollout: m.Rollout, event: Event) -> None:
        rollout.attempt -= event is Event.LEASE and rollout.attempt > 0
        real(state, rollout, event)

    real = core._move  # pyright: ignore[reportPrivateUsage]
    with mock.patch.object(core, "_move", move):
        yield


@bug("terminal is final", seeds_max=30)
def terminal_not_final() -> Generator[None]:
    """A CANCEL reaches what has succeeded."""

    def cancel(c: core.Context, body: m.Cancel) -> m.Body:
        live = [c.state.rollouts[i] for i in body.rollout_ids if c.state.rollouts[i].status is not Status.CANCELLED]
        for rollout in live:
            core._end(c.state, c.effects, rollout, Event.CANCEL, c.wall_ns)  # pyright: ignore[reportPrivateUsage]
        return m.Accepted(len(live))

    moves = {(Status.SUCCEEDED, Event.CANCEL): Status.CANCELLED, (Status.FAILED, Event.CANCEL): Status.CANCELLED}
    with _handler(m.Cancel, cancel), mock.patch.dict(lifecycle.MOVES, moves):
        yield


@bug("everything ends", seeds_max=20)
def queue_forgotten_by_a_restart() -> Generator[None]:
    def restore(*given: Any, **named: Any) -> core.BrokerState:
        state = real(*given, **named)
        state.ready.clear()
        return state

    real = core.restore
    with mock.patch.object(core, "restore", restore):
        yield


@bug("everything ends", seeds_max=20)
def delayed_rollouts_forgotten() -> Generator[None]:
    def tick(state: core.BrokerState, now_s: float, wall_ns: int) -> core.Effects:
        state.delayed.clear()
        return real(state, now_s, wall_ns)

    real = core.tick
    with mock.patch.object(core, "tick", tick):
        yield


@bug("everything ends", seeds_max=20)
def leases_never_expire() -> Generator[None]:
    def tick(state: core.BrokerState, now_s: float, wall_ns: int) -> core.Effects:
        for lease in state.table.leases.values():
            lease.expires_s = float("inf")
        return real(state, now_s, wall_ns)

    real = core.tick
    with mock.patch.object(core, "tick", tick):
        yield


@bug("counts add up", seeds_max=5)
def counts_drift() -> Generator[None]:
    def restore(*given: Any, **named: Any) -> core.BrokerState:
        state = real(*given, **named)
        state.counts[Status.QUEUED] += 1
        return state

    real = core.restore
    with mock.patch.object(core, "restore", restore):
        yield


# -- how ----------------------------------------------------------------------------------------------------------


@contextmanager
def _handler(kind: type[m.Body], handler: Callable[[core.Context, Any], m.Body]) -> Generator[None]:
    with mock.patch.dict(core._HANDLERS, {kind: handler}):  # pyright: ignore[reportPrivateUsage]
        yield


def _without_leases(effects: core.Effects) -> core.Effects:
    effects.writes = [write for write in effects.writes if not _is_lease(write)]
    return effects


def _is_lease(write: Write) -> bool:
    if not (isinstance(write, Put) and write.table is Table.ROLLOUTS):
        return False
    return msgspec.msgpack.decode(write.value, type=m.Rollout).status is Status.LEASED
