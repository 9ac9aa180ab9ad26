"""Bugs in the decisions about rollouts: attempts and their numbers, leases, delays, priorities, and how things end."""

from __future__ import annotations

import math
from collections.abc import Generator
from typing import Any
from unittest import mock

import msgspec

from lightning_bus import lifecycle
from lightning_bus import messages as m
from lightning_bus.broker import core, moves, rollouts
from lightning_bus.broker.ready import ReadyQueue
from lightning_bus.broker.state import Context
from lightning_bus.leases import LeaseTable
from lightning_bus.lifecycle import Event, Status
from lightning_bus.records import Put, Table, Write
from tests.simulation.planting import at_each_tick, at_restart, bug, handled_by, without_writes


@bug("only the holder reports", "never recorded", "appended twice", "filed as sent", seeds_max=20)
def forgotten_fence_of_results() -> Generator[None]:
    def must_hold(c: Context, rollout: m.Rollout, attempt: int) -> None:
        if rollout.status is not Status.LEASED:
            real(c, rollout, attempt)

    real = rollouts.must_hold
    with mock.patch.object(rollouts, "must_hold", must_hold):
        yield


@bug("fenced means not recorded", seeds_max=100)
def a_failure_sent_again_is_taken_for_a_late_one() -> Generator[None]:
    with mock.patch.object(rollouts, "_ended_by", lambda rollout, attempt, peer: False):
        yield


@bug("state and data agree", seeds_max=5)
def attempt_number_not_persisted() -> Generator[None]:
    """The lease goes out, its number stays in memory."""

    def is_lease(write: Write) -> bool:
        if not (isinstance(write, Put) and write.table is Table.STANDINGS):
            return False
        return msgspec.msgpack.decode(write.value, type=m.Standing).status is Status.LEASED

    with without_writes(is_lease):
        yield


@bug("attempts are 1, 2", seeds_max=10)
def attempt_number_used_again() -> Generator[None]:
    def move(state: core.BrokerState, rollout: m.Rollout, event: Event) -> None:
        rollout.attempt -= event is Event.LEASE and rollout.attempt > 0
        real(state, rollout, event)

    real = moves.move
    with mock.patch.object(moves, "move", move):
        yield


@bug("attempts are 1, 2", seeds_max=30)
def attempt_numbers_begin_anew_after_a_restart() -> Generator[None]:
    def harm(state: core.BrokerState, now_s: float) -> None:
        for rollout in state.rollouts.values():
            if rollout.status is Status.QUEUED:
                rollout.attempt = 0

    with at_restart(harm):
        yield


@bug("attempts are bounded", seeds_max=60)
def attempts_without_end() -> Generator[None]:
    def attempt_failed(state: core.BrokerState, *given: Any, **named: Any) -> None:
        state.max_attempts += 100
        real(state, *given, **named)
        state.max_attempts -= 100

    real = moves.attempt_failed
    with mock.patch.object(moves, "attempt_failed", attempt_failed):
        yield


@bug("what can be tried again is", seeds_max=20)
def one_attempt_too_few() -> Generator[None]:
    def attempt_failed(*given: Any, **named: Any) -> None:
        rollout: m.Rollout = given[2]
        limit = rollout.submission.max_attempts or given[0].max_attempts
        named["retryable"] = named.get("retryable", True) and rollout.attempt - rollout.excused < limit - 1
        real(*given, **named)

    real = moves.attempt_failed
    with mock.patch.object(moves, "attempt_failed", attempt_failed):
        yield


@bug("terminal is final", seeds_max=100)
def terminal_not_final() -> Generator[None]:
    """A CANCEL reaches what has failed."""

    def cancel(c: Context, body: m.Cancel) -> m.Body:
        known = {i: c.state.rollouts[i] for i in body.rollout_ids}
        live = [rollout for i, rollout in known.items() if not rollout.status.terminal or i in c.state.dead]
        for rollout in live:
            c.state.dead.pop(rollout.submission.rollout_id, None)
            moves.end(c.state, c.effects, rollout, Event.CANCEL, c.wall_ns)
        return m.Accepted(len(live))

    moves_too_many = {(Status.FAILED, Event.CANCEL): Status.CANCELLED}
    with handled_by(m.Cancel, cancel), mock.patch.dict(lifecycle.MOVES, moves_too_many):
        yield


# -- handed back --------------------------------------------------------------------------------------------------


@bug("state and data agree", seeds_max=60)
def a_release_counts() -> Generator[None]:
    def release(c: Context, body: m.Release) -> m.Body:
        rollout = c.state.rollouts[body.rollout_id]
        rollouts.must_hold(c, rollout, body.attempt)
        moves.requeue(c.state, c.effects, rollout, Event.RELEASE, c.now_s, c.wall_ns, delay_s=0.0)
        return m.Accepted(1)

    with handled_by(m.Release, release):
        yield


@bug("state and data agree", seeds_max=60)
def a_nack_does_not_count() -> Generator[None]:
    def attempt_failed(*given: Any, **named: Any) -> None:
        given[2].excused += named.get("event") is Event.NACK
        real(*given, **named)

    real = moves.attempt_failed
    with mock.patch.object(moves, "attempt_failed", attempt_failed):
        yield


@bug("delays are as asked", seeds_max=60)
def a_nack_is_not_delayed() -> Generator[None]:
    def attempt_failed(*given: Any, **named: Any) -> None:
        if named.get("event") is Event.NACK:
            named["delay_s"] = 0.0
        real(*given, **named)

    real = moves.attempt_failed
    with mock.patch.object(moves, "attempt_failed", attempt_failed):
        yield


# -- time ---------------------------------------------------------------------------------------------------------


@bug("everything ends", seeds_max=20)
def queue_forgotten_by_a_restart() -> Generator[None]:
    def harm(state: core.BrokerState, now_s: float) -> None:
        state.ready = ReadyQueue()

    with at_restart(harm):
        yield


@bug("everything ends", seeds_max=20)
def delayed_rollouts_forgotten() -> Generator[None]:
    with at_each_tick(lambda state: state.delayed.clear()):
        yield


@bug("a delayed rollout is not leased early", seeds_max=60)
def delays_forgotten_by_a_restart() -> Generator[None]:
    def harm(state: core.BrokerState, now_s: float) -> None:
        for rollout_id in list(state.delayed):
            state.delayed.set(rollout_id, now_s)

    with at_restart(harm):
        yield


@bug("everything ends", seeds_max=20)
def leases_never_expire() -> Generator[None]:
    def harm(state: core.BrokerState) -> None:
        for lease in state.table.leases.values():
            lease.expires_s = math.inf

    with at_each_tick(harm):
        yield


@bug("a lease lasts", seeds_max=60)
def leases_end_early() -> Generator[None]:
    def grant(*given: Any, **named: Any) -> Any:
        lease = real(*given, **named)
        lease.expires_s -= lease.lease_s / 2
        given[0]._next_due_s = 0.0
        return lease

    real = LeaseTable.grant
    with mock.patch.object(LeaseTable, "grant", grant):
        yield


@bug("a time limit ends an attempt", "everything ends", seeds_max=60)
def time_limits_forgotten() -> Generator[None]:
    def harm(state: core.BrokerState) -> None:
        for lease in state.table.leases.values():
            lease.ends_s = math.inf

    with at_each_tick(harm):
        yield


@bug("higher priority goes first", seeds_max=60)
def priorities_upside_down() -> Generator[None]:
    def push(queue: ReadyQueue, rollout_id: str, *, priority: int, **named: Any) -> None:
        real(queue, rollout_id, priority=-priority, **named)

    real = ReadyQueue.push
    with mock.patch.object(ReadyQueue, "push", push):
        yield


@bug("a draining broker leases nothing", seeds_max=200)
def draining_ignored() -> Generator[None]:
    with handled_by(m.Drain, lambda c, body: m.Accepted(1)):
        yield


@bug("counts add up", seeds_max=5)
def counts_drift() -> Generator[None]:
    def harm(state: core.BrokerState, now_s: float) -> None:
        state.counts[Status.QUEUED] += 1

    with at_restart(harm):
        yield
