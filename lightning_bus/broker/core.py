"""Every decision the broker takes, and no I/O: (state, message, now) → effects.

    effects = handle(state, peer, header, body, blobs, now_s, wall_ns, role)     a message arrived
    effects = tick(state, now_s, wall_ns)                                        time passed
    effects = drop_peer(state, peer, now_s, wall_ns)                             a peer lost its right to be here
    effects = forget(state, first_offset)                                        the log begins later now

What always holds. Effects are carried out in the order they were decided: writes first, in one transaction, then
sends, and never a send before the transaction it depends on is on disk. A rollout has at most one lease. An attempt
number is written before the task that carries it is sent, so that it never names two holders, whatever crashes.
Whatever a client may resend it may resend for ever: the answer is the same and nothing happens twice.

What a message does stands in the module of its subject: `rollouts`, `producers`, `shelf`, `letters`. This one leads
there, and keeps what concerns all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from lightning_bus import messages as m
from lightning_bus.broker import access, letters, moves, producers, rollouts, shelf
from lightning_bus.broker.effects import Effects, Send
from lightning_bus.broker.state import QUEUED_MAX, BrokerState, Context, Snapshot, check_name
from lightning_bus.errors import BusyError, FencedError, LightningBusError, RemoteProtocolError
from lightning_bus.leases import LeaseTable
from lightning_bus.lifecycle import Status
from lightning_bus.records import Delete, Table

__all__ = [
    "BrokerState", "Context", "Effects", "Send", "Snapshot",
    "drop_peer", "forget", "handle", "refuse", "restore", "tick",
]  # fmt: skip

FORGET_MAX = 10_000  # rollouts a call of `forget`; about 20 ms


def restore(
    snapshot: Snapshot, *, secret: bytes, lease_s: float, max_attempts: int, now_s: float, wall_ns: int = 0,
    queued_max: int = QUEUED_MAX,
) -> BrokerState:  # fmt: skip
    """Return the state of a broker that opens this log.

    Leases start anew: whoever still works on an attempt has a whole lease, and a whole timeout_s, to say so. What was
    delayed waits for what is left of its delay by the wall clock, the one use of that clock in a decision: for at
    most the whole delay, should somebody have set it back.
    """
    state = BrokerState(secret, max_attempts, LeaseTable(lease_s), queued_max, snapshot.next_offset)
    state.first_offset = snapshot.first_offset
    state.producers = dict(snapshot.producers)
    state.cursors = dict(snapshot.cursors)
    for resource in snapshot.resources:
        state.resources.setdefault(resource.name, {})[resource.version] = resource
    known = [_merged(rollout, snapshot.standings) for rollout in snapshot.rollouts]
    for rollout in sorted(known, key=lambda rollout: rollout.order):
        _restore_rollout(state, rollout, now_s, wall_ns)
    finished = [rollout for rollout in known if rollout.status.terminal]
    for rollout in sorted(finished, key=lambda rollout: rollout.ended_offset):
        rollout_id = rollout.submission.rollout_id
        state.finished.append(rollout_id)
        if rollout.status is Status.FAILED and not rollout.replayed_as and not rollout.purged:
            state.dead[rollout_id] = None
        else:
            state.rollouts.pack(rollout_id)
    return state


def handle(
    state: BrokerState, peer: str, header: m.Header, body: m.Body, blobs: list[bytes], now_s: float, wall_ns: int,
    role: str = "",
) -> Effects:  # fmt: skip
    """Return what a message brings about. A refused message changes nothing and is answered with an Error.

    `role` is what the peer's key says it is (`access.Role`); "" is a peer that is trusted without one.
    """
    effects = Effects()
    try:
        if header.producer != peer:
            raise RemoteProtocolError(f"producer {header.producer!r} speaks over the connection of {peer!r}")
        check_name("producer", peer)
        handler = _HANDLERS.get(type(body))
        if handler is None:
            raise RemoteProtocolError(f"{header.op.name} is not something to ask a broker")
        if role:
            access.check(role, body)
        answer = handler(Context(state, effects, header, peer, blobs, now_s, wall_ns, role), body)
        if answer is not None:
            effects.sends.insert(0, Send(peer, header.request, answer))
        if state.waits.told:
            effects.sends += state.waits.pushes()
    except LightningBusError as exc:
        assert not effects.writes  # handlers check everything before they change anything
        if isinstance(exc, FencedError):
            state.fenced += 1
        effects.sends = [refuse(state, peer, header.request, exc)]
    return effects


def refuse(state: BrokerState, peer: str, request: int, error: LightningBusError) -> Send:
    """Return the answer to a request that is turned down, and count it."""
    state.refused[type(error).__name__] += 1
    retry_after_s = error.retry_after_s if isinstance(error, BusyError) else 0.0
    return Send(peer, request, m.Error(type(error).__name__, str(error), retry_after_s))


def tick(state: BrokerState, now_s: float, wall_ns: int) -> Effects:
    """Return what the passing of time brings about: attempts end, delayed rollouts become ready, waits are over."""
    effects = Effects()
    for lease in state.table.expired(now_s):
        rollout_id, attempt = lease.rollout_id, lease.attempt
        if lease.ends_s <= now_s:
            timeout_s = state.rollouts[rollout_id].submission.timeout_s
            error = f"timed out: attempt {attempt} on {lease.worker} took longer than timeout_s={timeout_s:g}"
            delay_s = moves.retry_delay_s(rollout_id, attempt)
        else:
            error = f"lease expired: worker {lease.worker} was silent for {lease.lease_s:g} s"
            delay_s = 0.0
        moves.lose_lease(state, effects, rollout_id, error, now_s, wall_ns, delay_s=delay_s)
    state.table.forget_silent_workers(now_s)
    state.waits.expire(now_s)
    effects.sends += state.watches.expire(now_s)
    moves.enqueue_delayed(state, now_s)
    moves.dispatch(state, effects, now_s, wall_ns)
    effects.sends += state.waits.pushes()
    return effects


def drop_peer(state: BrokerState, peer: str, now_s: float, wall_ns: int) -> Effects:
    """Return what it brings about that a peer's key was revoked: what it holds goes to others at once.

    What it still sends is for the caller to refuse.
    """
    effects = Effects()
    state.table.forget_worker(peer)
    state.waits.forget_peer(peer)
    state.watches.forget_peer(peer)
    for lease in state.table.of_worker(peer):
        error = f"lease ended: the key of worker {peer} was revoked"
        moves.lose_lease(state, effects, lease.rollout_id, error, now_s, wall_ns, delay_s=0.0)
    moves.dispatch(state, effects, now_s, wall_ns)
    effects.sends += state.waits.pushes()
    return effects


def forget(state: BrokerState, first_offset: int) -> Effects:
    """Return what it brings about that retention dropped the records below `first_offset`.

    Rollouts whose end was among them are forgotten, with their idempotency keys: at most FORGET_MAX a call, so call
    it again now and then. Cursors stay where they are.
    """
    effects = Effects()
    state.first_offset = max(state.first_offset, first_offset)
    gone: set[str] = set()
    while state.finished and len(gone) < FORGET_MAX:
        rollout = state.rollouts[state.finished[0]]
        if rollout.ended_offset >= state.first_offset:
            break
        rollout_id = state.finished.popleft()
        if not rollout.ended_offset:
            continue  # ended before its end was noted, by an earlier release: kept, as nobody knows how old it is
        gone.add(rollout_id)
        state.rollouts.remove(rollout_id)
        state.counts[rollout.status] -= 1
        state.dead.pop(rollout_id, None)
        if state.keys.get(rollout.submission.key) == rollout_id:
            del state.keys[rollout.submission.key]
        for table in (Table.ROLLOUTS, Table.STANDINGS):
            effects.writes.append(Delete(table, rollout_id.encode()))
    if gone:
        state.line = [rollout_id for rollout_id in state.line if rollout_id not in gone]
    return effects


def _status(c: Context, body: m.StatusQuery) -> m.Body:
    state, table = c.state, c.state.table
    return m.StatusIs(
        rollouts={status.value: state.counts[status] for status in Status},
        workers=len(table.workers),
        slots=sum(worker.slots for worker in table.workers.values()),
        held=len(table.leases),
        next_offset=state.next_offset,
        requeued=state.requeued,
        fenced=state.fenced,
        dead=len(state.dead),
        delayed=len(state.delayed),
        draining=state.draining,
        first_offset=state.first_offset,
        refused=dict(state.refused),
    )


def _drain(c: Context, body: m.Drain) -> m.Body:
    changed = c.state.draining == body.resume
    c.state.draining = not body.resume
    moves.dispatch(c.state, c.effects, c.now_s, c.wall_ns)
    return m.Accepted(int(changed))


_HANDLERS: dict[type[m.Body], Callable[[Context, Any], m.Body | None]] = {
    m.Hello: producers.on_hello,
    m.Submit: rollouts.on_submit,
    m.Heartbeat: rollouts.on_heartbeat,
    m.Done: rollouts.on_done,
    m.Fail: rollouts.on_fail,
    m.Nack: rollouts.on_nack,
    m.Release: rollouts.on_release,
    m.Cancel: rollouts.on_cancel,
    m.Wait: rollouts.on_wait,
    m.Append: producers.on_append,
    m.Put: shelf.on_put,
    m.Get: shelf.on_get,
    m.Watch: shelf.on_watch,
    m.Commit: shelf.on_commit,
    m.StatusQuery: _status,
    m.Drain: _drain,
    m.Query: letters.on_query,
    m.Replay: letters.on_replay,
    m.Purge: letters.on_purge,
}


def _merged(rollout: m.Rollout, standings: dict[str, m.Standing]) -> m.Rollout:
    """Return the rollout where it stands now."""
    standing = standings.get(rollout.submission.rollout_id)
    if standing is None:
        return rollout
    return m.Rollout(rollout.submission, *msgspec.structs.astuple(standing))


def _restore_rollout(state: BrokerState, rollout: m.Rollout, now_s: float, wall_ns: int) -> None:
    submission = rollout.submission
    rollout_id = submission.rollout_id
    state.rollouts.add(rollout)
    state.line.append(rollout_id)
    state.next_order = rollout.order + 1
    state.counts[rollout.status] += 1
    if submission.key:
        state.keys[submission.key] = rollout_id
    if rollout.status is Status.LEASED:
        state.table.grant(
            rollout_id, rollout.attempt, rollout.worker, now_s, lease_s=submission.lease_s,
            timeout_s=submission.timeout_s, task_bytes=len(submission.task),
        )  # fmt: skip
    elif rollout.status is Status.QUEUED:
        left_s = min(rollout.delay_s, (rollout.ready_wall_ns - wall_ns) / 1e9) if rollout.delay_s else 0.0
        if left_s > 0:
            state.delayed.set(rollout_id, now_s + left_s)
        else:
            moves.enqueue(state, rollout, now_s)
