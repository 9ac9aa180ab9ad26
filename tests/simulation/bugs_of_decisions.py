"""Bugs in the decisions about the log: batches and their numbers, cursors, resources, and who waits for what."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any
from unittest import mock

import msgspec

from lightning_bus import messages as m
from lightning_bus.broker import core, moves, rollouts
from lightning_bus.broker.state import Context
from lightning_bus.broker.waits import Waits, Watches
from lightning_bus.lifecycle import Status
from lightning_bus.records import Put, Table
from tests.simulation.planting import at_restart, bug, handled_by, handler_of, without_writes


@bug("fenced results are never recorded", seeds_max=5)
def forgotten_fence_of_spans() -> Generator[None]:
    with mock.patch.object(moves, "is_running", lambda state, rollout_id, attempt: True):
        yield


@bug("nothing is appended twice", "batches", seeds_max=60)
def lost_dedup_mark() -> Generator[None]:
    """The mark of a batch is kept in memory only; a restart takes the first batch of an epoch again."""

    def is_mark(write: Any) -> bool:
        return isinstance(write, Put) and write.table is Table.PRODUCERS and msgspec.msgpack.decode(write.value)[1] > 0

    with without_writes(is_mark):
        yield


@bug("nothing is appended twice", "batches are in order", seeds_max=10)
def dedup_mark_not_looked_at() -> Generator[None]:
    def append(c: Context, body: m.Append) -> m.Body | None:
        mark = c.state.producers[c.peer]
        if (c.header.epoch, c.header.seq) == (mark.epoch, mark.seq):
            c.state.producers[c.peer] = msgspec.structs.replace(mark, seq=mark.seq - 1)
        return real(c, body)

    real = handler_of(m.Append)
    with handled_by(m.Append, append):
        yield


@bug("an acknowledged span is on disk", seeds_max=100)
def forgotten_verdicts_before_the_last() -> Generator[None]:
    """A batch that is sent again after newer ones is told that all of it was kept."""

    def append(c: Context, body: m.Append) -> m.Body | None:
        answer = real(c, body)
        if isinstance(answer, m.Acked) and answer.duplicate and c.header.seq < c.state.producers[c.peer].seq:
            return m.Acked(answer.next_offset, [], True)
        return answer

    real = handler_of(m.Append)
    with handled_by(m.Append, append):
        yield


@bug("is on disk", seeds_max=40)
def resync_acknowledged_as_stored() -> Generator[None]:
    def append(c: Context, body: m.Append) -> m.Body | None:
        answer = real(c, body)
        return m.Acked(c.state.next_offset) if isinstance(answer, m.Resync) else answer

    real = handler_of(m.Append)
    with handled_by(m.Append, append):
        yield


@bug("batches leave no gap", seeds_max=40)
def batch_taken_before_its_turn() -> Generator[None]:
    def append(c: Context, body: m.Append) -> m.Body | None:
        mark = c.state.producers[c.peer]
        if c.header.epoch == mark.epoch and c.header.seq > mark.seq + 1:
            c.state.producers[c.peer] = msgspec.structs.replace(mark, seq=c.header.seq - 1)
        return real(c, body)

    real = handler_of(m.Append)
    with handled_by(m.Append, append):
        yield


@bug("a cursor never skips", seeds_max=10)
def cursor_skip() -> Generator[None]:
    def cursor(c: Context, body: m.Commit) -> m.Body | None:
        if body.offset is not None and body.offset < c.state.next_offset:
            body = msgspec.structs.replace(body, offset=body.offset + 1)
        return real(c, body)

    real = handler_of(m.Commit)
    with handled_by(m.Commit, cursor):
        yield


@bug("a cursor never goes back", seeds_max=400)
def cursor_goes_back() -> Generator[None]:
    def cursor(c: Context, body: m.Commit) -> m.Body | None:
        if body.offset is not None:
            c.state.cursors[body.name] = 0
        return real(c, body)

    real = handler_of(m.Commit)
    with handled_by(m.Commit, cursor):
        yield


# -- who waits ----------------------------------------------------------------------------------------------------


@bug("who waits is told at once", seeds_max=60)
def push_to_who_waits_forgotten() -> Generator[None]:
    with mock.patch.object(Waits, "note_end", lambda waits, end: None):
        yield


@bug("who waits is told at once", "in the end", seeds_max=60)
def end_before_the_wait_not_told() -> Generator[None]:
    """What had ended when it was asked about is taken for something that is still to end."""

    def wait(c: Context, body: m.Wait) -> m.Body | None:
        answer = real(c, body)
        return m.Ended([], answer.open + len(answer.ended)) if isinstance(answer, m.Ended) else answer

    real = handler_of(m.Wait)
    with handled_by(m.Wait, wait):
        yield


@bug("nobody who is gone is remembered", seeds_max=60)
def waits_never_expire() -> Generator[None]:
    with mock.patch.object(Waits, "expire", lambda waits, now_s: None):
        yield


@bug("who watches is told at once", seeds_max=60)
def push_to_who_watches_forgotten() -> Generator[None]:
    with mock.patch.object(Watches, "published", lambda watches, resource: []):
        yield


# -- dead letters and keys ----------------------------------------------------------------------------------------


@bug("a known id with another task is refused", seeds_max=20)
def another_task_under_a_known_id_accepted() -> Generator[None]:
    with mock.patch.object(rollouts, "_check_same", lambda state, known, submission: None):
        yield


@bug("one rollout an idempotency key", seeds_max=60)
def keys_forgotten_by_a_restart() -> Generator[None]:
    with at_restart(lambda state, now_s: state.keys.clear()):
        yield


@bug("an acknowledged rollout is on disk", "one rollout an idempotency key", seeds_max=60)
def keys_not_told() -> Generator[None]:
    """SUBMIT of a known key is accepted without a word about the id that the rollout has."""

    def submit(c: Context, body: m.Submit) -> m.Body | None:
        answer = real(c, body)
        return m.Accepted(answer.fresh) if isinstance(answer, m.Accepted) else answer

    real = handler_of(m.Submit)
    with handled_by(m.Submit, submit):
        yield


@bug("one replay a dead letter", seeds_max=60)
def replay_not_marked() -> Generator[None]:
    with mock.patch.object(moves, "record_event", _without("replay")):
        yield


@bug("an acknowledged purge is on disk", seeds_max=60)
def purge_not_written() -> Generator[None]:
    with mock.patch.object(moves, "record_event", _without("purge")):
        yield


@bug("a dead letter keeps its task", seeds_max=100)
def dead_letters_lose_their_task_at_a_restart() -> Generator[None]:
    def harm(state: core.BrokerState, now_s: float) -> None:
        for rollout_id in state.dead:
            rollout = state.rollouts[rollout_id]
            assert rollout.status is Status.FAILED
            rollout.submission = msgspec.structs.replace(rollout.submission, task=b"")

    with at_restart(harm):
        yield


def _without(what: str) -> Any:
    def record_event(state: Any, effects: Any, rollout: Any, event: str, *given: Any, **named: Any) -> None:
        if event != what:
            real(state, effects, rollout, event, *given, **named)

    real = moves.record_event
    return record_event
