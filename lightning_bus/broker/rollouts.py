"""What clients and workers say about rollouts: SUBMIT, CANCEL, WAIT; HEARTBEAT, DONE, FAIL, NACK, RELEASE.

What always holds. Whatever may be sent again may be sent again for ever: the answer is the same and nothing happens
twice. A handler checks everything before it changes anything, so a refused message has changed nothing.
"""

from __future__ import annotations

import math
import re

import msgspec

from lightning_bus import messages as m
from lightning_bus.broker import moves
from lightning_bus.broker.effects import Send
from lightning_bus.broker.state import (
    BrokerState,
    Context,
    check_blobs,
    check_name,
    encode,
    record,
    rollout_of,
)
from lightning_bus.broker.waits import WAIT_IDS_MAX, WAIT_MS_MAX, end_of, ended
from lightning_bus.errors import BusyError, CallError, Conflict, FencedError, MessageTooLarge, RemoteProtocolError
from lightning_bus.lifecycle import Event, Status
from lightning_bus.records import Kind, Put, RolloutEvent, Table

ROLLOUT_ID = re.compile(r"[A-Za-z0-9._-]{1,200}")  # it stands in URLs and LMDB keys (511 bytes at most)
LEASE_S_MIN = 0.1  # the broker looks ten times a second
BUSY_RETRY_S = 1.0

# -- clients ------------------------------------------------------------------------------------------------------


def on_submit(c: Context, body: m.Submit) -> m.Body:
    state = c.state
    fresh: dict[str, m.Submission] = {}
    keys: dict[str, str] = {}  # of the fresh ones
    rollout_ids: list[str] = []
    for submission in body.rollouts:
        key = submission.key
        rollout_id = (state.keys.get(key) or keys.get(key) if key else None) or submission.rollout_id
        rollout = state.rollouts.find(rollout_id)
        known = rollout.submission if rollout is not None else fresh.get(rollout_id)
        rollout_ids.append(rollout_id)
        if known is not None:
            _check_same(state, known, submission)
            continue
        _check_submission(submission)
        fresh[rollout_id] = submission
        if key:
            keys[key] = rollout_id
    check_queue_room(state, len(fresh))
    new = [new_rollout(c, submission, state.next_order + place) for place, submission in enumerate(fresh.values())]
    for rollout, stored in new:
        enter(c, rollout, stored)
    moves.dispatch(state, c.effects, c.now_s, c.wall_ns)
    with_keys = any(submission.key for submission in body.rollouts)
    return m.Accepted(len(fresh), rollout_ids if with_keys else [])


def new_rollout(c: Context, submission: m.Submission, order: int) -> tuple[m.Rollout, bytes]:
    """Return a rollout as it begins, and the bytes that the log keeps of it. Raises MessageTooLarge."""
    delay_s = submission.delay_s
    ready_wall_ns = c.wall_ns + int(delay_s * 1e9) if delay_s else 0
    rollout = m.Rollout(submission, Status.QUEUED, order=order, ready_wall_ns=ready_wall_ns, delay_s=delay_s)
    stored = encode(rollout)
    # The rollout is a little longer than the submission: only near the limit is it worth measuring twice.
    if len(stored) > m.SUBMISSION_BYTES_MAX and (size := len(encode(submission))) > m.SUBMISSION_BYTES_MAX:
        raise MessageTooLarge(
            f"rollout {submission.rollout_id}: a submission of {size} bytes exceeds the limit of "
            f"{m.SUBMISSION_BYTES_MAX}. Keep large inputs in a file and submit the path."
        )
    return rollout, stored


def enter(c: Context, rollout: m.Rollout, stored: bytes) -> None:
    """Take a new rollout in; `stored` is what the log keeps of it."""
    state, submission = c.state, rollout.submission
    rollout_id = submission.rollout_id
    state.rollouts.add(rollout)
    state.line.append(rollout_id)
    state.next_order = rollout.order + 1
    state.counts[Status.QUEUED] += 1
    if submission.key:
        state.keys[submission.key] = rollout_id
    if submission.delay_s > 0:
        state.delayed.set(rollout_id, c.now_s + submission.delay_s)
    else:
        moves.enqueue(state, rollout, c.now_s)
    event = RolloutEvent("submit", Status.QUEUED, submission.group, labels=submission.labels, task=submission.task)
    record(state, c.effects, Kind.ROLLOUT, c.wall_ns, encode(event), rollout_id=rollout_id)
    c.effects.writes.append(Put(Table.ROLLOUTS, rollout_id.encode(), stored))


def check_queue_room(state: BrokerState, count: int) -> None:
    """Raise BusyError when the queue has no room for so many more; CallError when it never will."""
    if count and state.counts[Status.QUEUED] + count > state.queued_max:
        if count > state.queued_max:
            raise CallError(
                f"{count} rollouts in one message exceed the queue's limit of {state.queued_max} ([broker] queued_max). "
                "Submit fewer at a time."
            )
        raise BusyError(
            f"{state.counts[Status.QUEUED]} rollouts wait for a worker and {count} more would exceed the limit of "
            f"{state.queued_max} ([broker] queued_max). Submit again in {BUSY_RETRY_S:g} s, or start more workers.",
            BUSY_RETRY_S,
        )


def on_cancel(c: Context, body: m.Cancel) -> m.Body:
    rollouts = [rollout_of(c.state, rollout_id) for rollout_id in dict.fromkeys(body.rollout_ids)]
    live = [rollout for rollout in rollouts if not rollout.status.terminal]
    for rollout in live:
        if rollout.status is Status.LEASED:
            rollout.worker = ""  # its attempt was not ended by its worker
        moves.end(c.state, c.effects, rollout, Event.CANCEL, c.wall_ns)
    moves.sweep(c.state, c.now_s)
    return m.Accepted(len(live))


def on_wait(c: Context, body: m.Wait) -> m.Body:
    ids = dict.fromkeys(body.rollout_ids)
    asker = (c.peer, c.header.request)
    if len(ids) > WAIT_IDS_MAX:
        raise CallError(f"{len(ids)} rollouts in one WAIT; at most {WAIT_IDS_MAX} are allowed. Send several.")
    rollouts = [rollout_of(c.state, rollout_id) for rollout_id in ids]
    open_ids = [rollout.submission.rollout_id for rollout in rollouts if not rollout.status.terminal]
    c.state.waits.check_room(asker, len(open_ids))
    wait_s = min(body.wait_ms, WAIT_MS_MAX) / 1000
    c.state.waits.subscribe(asker, open_ids if wait_s else [], c.now_s + wait_s)
    first, *more = ended([end_of(rollout) for rollout in rollouts if rollout.status.terminal], len(open_ids))
    c.effects.sends += [Send(*asker, rest) for rest in more]
    return first


# -- workers ------------------------------------------------------------------------------------------------------


def on_heartbeat(c: Context, body: m.Heartbeat) -> m.Body:
    table = c.state.table
    table.beat(c.peer, body.slots, c.now_s, body.task_bytes_max)
    lost: list[m.Held] = []
    held: set[str] = set()
    for claim in body.held:
        lease = table.holds(c.peer, claim.rollout_id, claim.attempt)
        if lease is None:
            lost.append(claim)
        else:
            lease.expires_s = c.now_s + lease.lease_s
            held.add(claim.rollout_id)
    for lease in table.of_worker(c.peer):
        # The worker does not know of a task it was sent: the message was lost with a connection. Sending the same
        # attempt again is safe, because it goes to the one who holds it.
        if lease.rollout_id not in held and c.now_s - lease.granted_s > lease.lease_s / 4:
            c.effects.sends.append(
                Send(c.peer, 0, moves.task_of(c.state, c.state.rollouts[lease.rollout_id], c.wall_ns))
            )
    moves.dispatch(c.state, c.effects, c.now_s, c.wall_ns)
    return m.Beat(lost)


def on_done(c: Context, body: m.Done) -> m.Body:
    rollout = rollout_of(c.state, body.rollout_id)
    if rollout.status is Status.SUCCEEDED and rollout.attempt == body.attempt and rollout.worker == c.peer:
        return m.Accepted(0)  # our answer was lost, the worker asks again
    must_hold(c, rollout, body.attempt)
    if body.reward is not None and not math.isfinite(body.reward):
        raise CallError(f"rollout {body.rollout_id}: a reward is a finite number or None, not {body.reward}")
    _check_last_spans(c)
    _append_last_spans(c, rollout)
    rollout.reward = body.reward
    rollout.error = ""
    moves.end(c.state, c.effects, rollout, Event.SUCCEED, c.wall_ns)
    moves.dispatch(c.state, c.effects, c.now_s, c.wall_ns)
    return m.Accepted(1)


def on_fail(c: Context, body: m.Fail) -> m.Body:
    rollout = rollout_of(c.state, body.rollout_id)
    if _ended_by(rollout, body.attempt, c.peer):
        return m.Accepted(0)
    must_hold(c, rollout, body.attempt)
    _check_last_spans(c)
    _append_last_spans(c, rollout)
    moves.attempt_failed(
        c.state, c.effects, rollout, body.error, c.now_s, c.wall_ns, retryable=body.retryable,
        delay_s=moves.retry_delay_s(body.rollout_id, body.attempt),
    )  # fmt: skip
    moves.dispatch(c.state, c.effects, c.now_s, c.wall_ns)
    return m.Accepted(1)


def on_nack(c: Context, body: m.Nack) -> m.Body:
    rollout = rollout_of(c.state, body.rollout_id)
    if _ended_by(rollout, body.attempt, c.peer):
        return m.Accepted(0)
    must_hold(c, rollout, body.attempt)
    _check_no_blobs(c)
    moves.attempt_failed(
        c.state, c.effects, rollout, body.reason or "the worker did not want it now (NACK)", c.now_s, c.wall_ns,
        delay_s=body.delay_s, event=Event.NACK,
    )  # fmt: skip
    moves.dispatch(c.state, c.effects, c.now_s, c.wall_ns)
    return m.Accepted(1)


def on_release(c: Context, body: m.Release) -> m.Body:
    rollout = rollout_of(c.state, body.rollout_id)
    if _ended_by(rollout, body.attempt, c.peer):
        return m.Accepted(0)
    must_hold(c, rollout, body.attempt)
    _check_no_blobs(c)
    rollout.excused += 1
    moves.requeue(c.state, c.effects, rollout, Event.RELEASE, c.now_s, c.wall_ns, delay_s=0.0)
    moves.dispatch(c.state, c.effects, c.now_s, c.wall_ns)
    return m.Accepted(1)


def must_hold(c: Context, rollout: m.Rollout, attempt: int) -> None:
    """Raise FencedError unless the peer holds this attempt."""
    rollout_id = rollout.submission.rollout_id
    if c.state.table.holds(c.peer, rollout_id, attempt) is None:
        submission = rollout.submission
        raise FencedError(
            f"rollout {rollout_id} attempt {attempt}: not held by {c.peer} any more; it is {rollout.status.value} at attempt "
            f"{rollout.attempt}. This result was not recorded. Heartbeat more often or raise [broker] lease_s "
            f"(now {submission.lease_s or c.state.table.lease_s:g})."
            + (f" An attempt may take timeout_s={submission.timeout_s:g}." if submission.timeout_s else "")
        )


# -- what they check ----------------------------------------------------------------------------------------------


def _ended_by(rollout: m.Rollout, attempt: int, peer: str) -> bool:
    """True when this worker handed back or failed this attempt before: its answer was lost and it asks again.

    The two newest attempts are remembered, so a resend is known even when the rollout was leased anew meanwhile.
    """
    if attempt == rollout.attempt:
        return rollout.worker == peer and rollout.status not in (Status.LEASED, Status.SUCCEEDED)
    return attempt == rollout.attempt - 1 and rollout.worker_before == peer


def _check_same(state: BrokerState, known: m.Submission, submission: m.Submission) -> None:
    """Raise Conflict when a submission is not the one that is known by its id or key."""
    if known.rollout_id in state.rollouts:
        same_task = state.rollouts.same_task(known.rollout_id, submission.task)
    else:
        same_task = known.task == submission.task  # of this message
    if submission == known and same_task:
        return
    what = "rollout_id" if submission.key and submission.key == known.key else ""
    for field in () if not same_task else msgspec.structs.fields(m.Submission):
        theirs, ours = getattr(submission, field.name), getattr(known, field.name)
        if field.name not in ("task", what) and theirs != ours:
            raise Conflict(
                f"rollout {known.rollout_id} was submitted before with {field.name} {ours!r:.100}, now with {theirs!r:.100}. "
                "Submit the same again, or choose another id" + (" and key." if what else ".")
            )
    if not same_task:
        raise Conflict(
            f"rollout {known.rollout_id} was submitted before with another task. Choose another id"
            + (" and key." if what else ".")
        )


def _check_submission(submission: m.Submission) -> None:
    if not ROLLOUT_ID.fullmatch(submission.rollout_id):
        raise CallError(f"rollout id {submission.rollout_id!r}: 1 to 200 of A-Z a-z 0-9 . _ - are allowed")
    if submission.key:
        check_name("idempotency key", submission.key)
    if 0 < submission.lease_s < LEASE_S_MIN:
        raise CallError(
            f"rollout {submission.rollout_id}: lease_s {submission.lease_s:g} is below {LEASE_S_MIN:g}, how often the broker "
            "looks. 0 takes the broker's own."
        )


def _check_last_spans(c: Context) -> None:
    if len(c.blobs) > 1:
        raise RemoteProtocolError(f"{c.header.op.name} carries one chunk of last spans, not {len(c.blobs)}")
    check_blobs(c.blobs)


def _check_no_blobs(c: Context) -> None:
    if c.blobs:
        raise RemoteProtocolError(f"{c.header.op.name} carries no spans: the attempt is given up, not reported")


def _append_last_spans(c: Context, rollout: m.Rollout) -> None:
    """Spans that ride with DONE or FAIL: state and data commit together. Resends are caught by the rollout's status."""
    for part, blob in enumerate(c.blobs):
        record(
            c.state, c.effects, Kind.SPANS, c.wall_ns, blob, producer=c.peer, epoch=c.header.epoch,
            part=part, rollout_id=rollout.submission.rollout_id, attempt=rollout.attempt, span_count=c.header.count,
        )  # fmt: skip
