"""Every decision the broker takes, and no I/O: (state, message, now) → effects.

    effects = handle(state, peer, message, now_s, wall_ns)     a message arrived
    effects = tick(state, now_s, wall_ns)                      time passed

What always holds. Effects are carried out in the order they were decided: writes first, in one transaction, then
sends, and never a send before the transaction it depends on is on disk. A rollout has at most one lease. An attempt
number is written before the task that carries it is sent, so that it never names two holders, whatever crashes.
Whatever a client may resend it may resend for ever: the answer is the same and nothing happens twice.
"""

from __future__ import annotations

import heapq
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgspec

from lightning_bus import messages as m
from lightning_bus.errors import (
    CallError,
    Conflict,
    FencedError,
    LightningBusError,
    MessageTooLarge,
    NotFound,
    RemoteProtocolError,
)
from lightning_bus.leases import LeaseTable
from lightning_bus.lifecycle import Event, Status, next_status
from lightning_bus.records import Kind, ProducerMark, Put, Record, RolloutEvent, Table, Write
from lightning_bus.resources import Resource
from lightning_bus.tokens import Claims, mint

ROLLOUT_ID = re.compile(r"[A-Za-z0-9._-]{1,200}")  # it stands in URLs and LMDB keys (511 bytes at most)
NAME_BYTES_MAX = 400  # of producers, cursors and resources; LMDB keys again
ERROR_CHARS_MAX = 16_384  # a traceback; what is cut is its middle, which nobody misses
RETRY_DELAY_S = 0.5  # doubles with each attempt
RETRY_DELAY_MAX_S = 30.0

encode = msgspec.msgpack.Encoder().encode


class Send(NamedTuple):
    """Answer or task for one peer, to go out once the writes decided with it are durable."""

    peer: str
    request: int
    body: m.Body


@dataclass(slots=True)
class Effects:
    """What a decision asks for: `writes` in one transaction, then `sends`."""

    writes: list[Write] = field(default_factory=list[Write])
    sends: list[Send] = field(default_factory=list[Send])


@dataclass(slots=True)
class Snapshot:
    """What a log holds when a broker opens it."""

    next_offset: int = 0
    rollouts: list[m.Rollout] = field(default_factory=list[m.Rollout])
    producers: dict[str, ProducerMark] = field(default_factory=dict[str, ProducerMark])
    cursors: dict[str, int] = field(default_factory=dict[str, int])
    resources: list[Resource] = field(default_factory=list[Resource])


@dataclass(slots=True)
class BrokerState:
    """Everything the broker knows. Only this module changes it."""

    secret: bytes
    max_attempts: int
    table: LeaseTable
    next_offset: int = 0
    rollouts: dict[str, m.Rollout] = field(default_factory=dict[str, m.Rollout])
    producers: dict[str, ProducerMark] = field(default_factory=dict[str, ProducerMark])
    cursors: dict[str, int] = field(default_factory=dict[str, int])
    resources: dict[str, dict[int, Resource]] = field(default_factory=dict[str, dict[int, Resource]])
    ready: list[tuple[int, str]] = field(default_factory=list[tuple[int, str]])  # heap; stale entries are skipped
    delayed: list[tuple[float, str]] = field(default_factory=list[tuple[float, str]])  # heap by time
    counts: Counter[str] = field(default_factory=Counter[str])  # rollouts by status
    requeued: int = 0
    fenced: int = 0


def restore(snapshot: Snapshot, *, secret: bytes, lease_s: float, max_attempts: int, now_s: float) -> BrokerState:
    """Return the state of a broker that opens this log.

    Leases start anew: whoever still works on an attempt has a whole lease to say so.
    """
    state = BrokerState(secret, max_attempts, LeaseTable(lease_s), next_offset=snapshot.next_offset)
    state.producers = dict(snapshot.producers)
    state.cursors = dict(snapshot.cursors)
    for resource in snapshot.resources:
        state.resources.setdefault(resource.name, {})[resource.version] = resource
    for rollout in snapshot.rollouts:
        rollout_id = rollout.submission.rollout_id
        state.rollouts[rollout_id] = rollout
        state.counts[rollout.status] += 1
        if rollout.status is Status.QUEUED:
            heapq.heappush(state.ready, (rollout.order, rollout_id))
        elif rollout.status is Status.LEASED:
            state.table.grant(rollout_id, rollout.attempt, rollout.worker, now_s)
    return state


class Context(NamedTuple):
    """One message and when it came."""

    state: BrokerState
    effects: Effects
    header: m.Header
    peer: str
    blobs: list[bytes]
    now_s: float
    wall_ns: int


def handle(
    state: BrokerState, peer: str, header: m.Header, body: m.Body, blobs: list[bytes], now_s: float, wall_ns: int
) -> Effects:
    """Return what a message brings about. A refused message changes nothing and is answered with an Error."""
    effects = Effects()
    context = Context(state, effects, header, peer, blobs, now_s, wall_ns)
    try:
        if header.producer != peer:
            raise RemoteProtocolError(f"producer {header.producer!r} speaks over the connection of {peer!r}")
        _check_name("producer", peer)
        handler = _HANDLERS.get(type(body))
        if handler is None:
            raise RemoteProtocolError(f"{header.op.name} is not something to ask a broker")
        answer = handler(context, body)
        effects.sends.insert(0, Send(peer, header.request, answer))
    except LightningBusError as exc:
        assert not effects.writes  # handlers check everything before they change anything
        if isinstance(exc, FencedError):
            state.fenced += 1
        effects.sends = [Send(peer, header.request, m.Error(type(exc).__name__, str(exc)))]
    return effects


def tick(state: BrokerState, now_s: float, wall_ns: int) -> Effects:
    """Return what the passing of time brings about: leases end, delayed rollouts become ready."""
    effects = Effects()
    for lease in state.table.expired(now_s):
        rollout = state.rollouts[lease.rollout_id]
        rollout.worker = ""  # this attempt was not ended by its worker: what that still sends is late, not a resend
        silence = f"lease expired: worker {lease.worker} was silent for {state.table.lease_s:g} s"
        _attempt_failed(state, effects, rollout, silence, True, now_s, wall_ns, delay_s=0.0)
    state.table.forget_silent_workers(now_s)
    while state.delayed and state.delayed[0][0] <= now_s:
        _, rollout_id = heapq.heappop(state.delayed)
        rollout = state.rollouts[rollout_id]
        if rollout.status is Status.QUEUED:
            heapq.heappush(state.ready, (rollout.order, rollout_id))
    _dispatch(state, effects, list(state.table.workers), now_s, wall_ns)
    return effects


# -- what each message does ---------------------------------------------------------------------------------------


def _hello(c: Context, body: m.Hello) -> m.Body:
    mark = c.state.producers.get(c.peer)
    epoch_last = mark.epoch if mark else 0
    resent = mark is not None and body.nonce != b"" and body.nonce == mark.nonce
    succeeds = body.epoch == epoch_last and body.nonce != b""  # whoever has this epoch asks for the next one
    if mark is None or ((body.epoch == 0 or succeeds) and not resent):
        # Clients knock before the broker is up and knock again, so several HELLOs may arrive where one was meant.
        mark = ProducerMark(max(epoch_last, body.epoch) + 1, nonce=body.nonce)
        c.state.producers[c.peer] = mark
        c.effects.writes.append(Put(Table.PRODUCERS, c.peer.encode(), encode(mark)))
    elif not resent and body.epoch < epoch_last:
        raise FencedError(f"{c.peer} epoch {body.epoch} was succeeded by epoch {epoch_last}. This session is over.")
    return m.Welcome(mark.epoch, mark.seq, m.MESSAGE_BYTES_MAX, c.state.table.lease_s, c.state.next_offset)


def _submit(c: Context, body: m.Submit) -> m.Body:
    fresh: dict[str, m.Submission] = {}
    for submission in body.rollouts:
        rollout = c.state.rollouts.get(submission.rollout_id)
        known = rollout.submission if rollout is not None else fresh.get(submission.rollout_id)
        if not ROLLOUT_ID.fullmatch(submission.rollout_id):
            raise CallError(f"rollout id {submission.rollout_id!r}: 1 to 200 of A-Z a-z 0-9 . _ - are allowed")
        if known is not None and known.task != submission.task:
            raise Conflict(
                f"rollout {submission.rollout_id} was submitted before with another task. Choose another id."
            )
        if known is None:
            size = len(encode(submission))
            if size > m.SUBMISSION_BYTES_MAX:
                raise MessageTooLarge(
                    f"rollout {submission.rollout_id}: a submission of {size} bytes exceeds the limit of "
                    f"{m.SUBMISSION_BYTES_MAX}. Keep large inputs in a file and submit the path."
                )
            fresh[submission.rollout_id] = submission
    for submission in fresh.values():
        rollout = m.Rollout(submission, Status.QUEUED, order=len(c.state.rollouts))
        c.state.rollouts[submission.rollout_id] = rollout
        c.state.counts[Status.QUEUED] += 1
        heapq.heappush(c.state.ready, (rollout.order, submission.rollout_id))
        _record_event(c.state, c.effects, rollout, "submit", c.wall_ns, task=submission.task)
    _dispatch(c.state, c.effects, list(c.state.table.workers), c.now_s, c.wall_ns)
    return m.Accepted(len(fresh))


def _heartbeat(c: Context, body: m.Heartbeat) -> m.Body:
    table = c.state.table
    table.beat(c.peer, body.slots, c.now_s)
    lost: list[m.Held] = []
    held: set[str] = set()
    for claim in body.held:
        lease = table.holds(c.peer, claim.rollout_id, claim.attempt)
        if lease is None:
            lost.append(claim)
        else:
            lease.expires_s = c.now_s + table.lease_s
            held.add(claim.rollout_id)
    for lease in table.of_worker(c.peer):
        # The worker does not know of a task it was sent: the message was lost with a connection. Sending the same
        # attempt again is safe, because it goes to the one who holds it.
        if lease.rollout_id not in held and c.now_s - lease.granted_s > table.lease_s / 4:
            c.effects.sends.append(Send(c.peer, 0, _task(c.state, c.state.rollouts[lease.rollout_id])))
    _dispatch(c.state, c.effects, [c.peer], c.now_s, c.wall_ns)
    return m.Beat(lost)


def _done(c: Context, body: m.Done) -> m.Body:
    rollout = _rollout(c.state, body.rollout_id)
    if rollout.status is Status.SUCCEEDED and rollout.attempt == body.attempt and rollout.worker == c.peer:
        return m.Accepted(0)  # our answer was lost, the worker asks again
    _must_hold(c, rollout, body.attempt)
    if body.reward is not None and not math.isfinite(body.reward):
        raise CallError(f"rollout {body.rollout_id}: a reward is a finite number or None, not {body.reward}")
    _check_last_spans(c)
    _append_last_spans(c, rollout)
    rollout.reward = body.reward
    rollout.error = ""
    _end(c.state, c.effects, rollout, Event.SUCCEED, c.wall_ns)
    _dispatch(c.state, c.effects, [c.peer], c.now_s, c.wall_ns)
    return m.Accepted(1)


def _fail(c: Context, body: m.Fail) -> m.Body:
    rollout = _rollout(c.state, body.rollout_id)
    resent = rollout.status in (Status.QUEUED, Status.FAILED) and rollout.attempt == body.attempt
    if resent and rollout.worker == c.peer:
        return m.Accepted(0)
    _must_hold(c, rollout, body.attempt)
    _check_last_spans(c)
    _append_last_spans(c, rollout)
    delay_s = min(RETRY_DELAY_MAX_S, RETRY_DELAY_S * 2.0 ** min(body.attempt - 1, 16))
    _attempt_failed(c.state, c.effects, rollout, body.error, body.retryable, c.now_s, c.wall_ns, delay_s)
    _dispatch(c.state, c.effects, [c.peer], c.now_s, c.wall_ns)
    return m.Accepted(1)


def _cancel(c: Context, body: m.Cancel) -> m.Body:
    rollouts = [_rollout(c.state, rollout_id) for rollout_id in dict.fromkeys(body.rollout_ids)]
    live = [rollout for rollout in rollouts if not rollout.status.terminal]
    for rollout in live:
        _end(c.state, c.effects, rollout, Event.CANCEL, c.wall_ns)
    return m.Accepted(len(live))


def _append(c: Context, body: m.Append) -> m.Body:
    mark = c.state.producers.get(c.peer)
    if mark is None:
        raise RemoteProtocolError(f"{c.peer} appends before HELLO")
    if c.header.epoch < mark.epoch:
        raise FencedError(f"{c.peer} epoch {c.header.epoch} was succeeded by epoch {mark.epoch}. This session is over.")
    if len(body.parts) != len(c.blobs):
        raise RemoteProtocolError(f"{len(body.parts)} parts named, {len(c.blobs)} sent")
    _check_blobs(c.blobs)
    batch = c.header.epoch, c.header.seq
    if batch == (mark.epoch, mark.seq) and mark.seq > 0:
        return m.Acked(c.state.next_offset, mark.fenced, duplicate=True)
    if batch != (mark.epoch, mark.seq + 1):
        raise RemoteProtocolError(
            f"{c.peer} sent batch {c.header.epoch}:{c.header.seq}; after {mark.epoch}:{mark.seq} comes {mark.epoch}:{mark.seq + 1}"
        )
    fenced: list[int] = []
    for index, (part, blob) in enumerate(zip(body.parts, c.blobs, strict=True)):
        if part.rollout_id and not _is_running(c.state, part.rollout_id, part.attempt):
            fenced.append(index)
            continue
        _append_spans(c, part.rollout_id, part.attempt, part.count, blob, index)
    c.state.fenced += len(fenced)
    mark = ProducerMark(mark.epoch, c.header.seq, fenced, mark.nonce)
    c.state.producers[c.peer] = mark
    c.effects.writes.append(Put(Table.PRODUCERS, c.peer.encode(), encode(mark)))
    return m.Acked(c.state.next_offset, fenced)


def _put(c: Context, body: m.Put) -> m.Body:
    resource = body.resource
    versions = c.state.resources.get(resource.name, {})
    known = versions.get(resource.version)
    if known is not None:
        if known != resource:
            raise Conflict(
                f"{resource.name} version {resource.version} is published with other content. Publish the next version."
            )
        return m.Accepted(0)
    _check_name("resource", resource.name)
    if resource.version < 0:
        raise CallError(f"{resource.name}: version {resource.version} is below 0")
    _check_blobs([resource.body])
    c.state.resources.setdefault(resource.name, {})[resource.version] = resource
    body_bytes = encode(resource)
    key = resource.name.encode() + b"\0" + resource.version.to_bytes(8, "big")
    c.effects.writes.append(Put(Table.RESOURCES, key, body_bytes))
    _record(c.state, c.effects, Kind.RESOURCE, c.wall_ns, body_bytes, producer=c.peer)
    return m.Accepted(1)


def _get(c: Context, body: m.Get) -> m.Body:
    versions = c.state.resources.get(body.name, {})
    if not versions:
        return m.ResourceIs(None)
    return m.ResourceIs(versions.get(max(versions) if body.version is None else body.version))


def _cursor(c: Context, body: m.Cursor) -> m.Body:
    _check_name("cursor", body.name)
    at = c.state.cursors.get(body.name, 0)
    if body.offset is not None and body.offset != at:
        if not at < body.offset <= c.state.next_offset:
            raise CallError(
                f"cursor {body.name} is at {at}, the log ends at {c.state.next_offset}: it cannot move to {body.offset}"
            )
        c.state.cursors[body.name] = at = body.offset
        c.effects.writes.append(Put(Table.CURSORS, body.name.encode(), encode(at)))
    return m.CursorAt(body.name, at)


def _status(c: Context, body: m.StatusQuery) -> m.Body:
    table = c.state.table
    return m.StatusIs(
        rollouts={status.value: c.state.counts[status] for status in Status},
        workers=len(table.workers),
        slots=sum(worker.slots for worker in table.workers.values()),
        held=len(table.leases),
        next_offset=c.state.next_offset,
        requeued=c.state.requeued,
        fenced=c.state.fenced,
    )


def _query(c: Context, body: m.Query) -> m.Body:
    ids: Iterable[str] = body.rollout_ids or c.state.rollouts
    found = (c.state.rollouts[rollout_id] for rollout_id in ids if rollout_id in c.state.rollouts)
    # Copies: an answer is encoded when it is sent, and must not show what was decided, but not yet written, by then.
    return m.Rollouts([copy(rollout) for rollout, _ in zip(found, range(body.limit), strict=False)])


_HANDLERS: dict[type[m.Body], Callable[[Context, Any], m.Body]] = {
    m.Hello: _hello,
    m.Submit: _submit,
    m.Heartbeat: _heartbeat,
    m.Done: _done,
    m.Fail: _fail,
    m.Cancel: _cancel,
    m.Append: _append,
    m.Put: _put,
    m.Get: _get,
    m.Cursor: _cursor,
    m.StatusQuery: _status,
    m.Query: _query,
}


# -- the moves they share -----------------------------------------------------------------------------------------


def _dispatch(state: BrokerState, effects: Effects, workers: list[str], now_s: float, wall_ns: int) -> None:
    """Lease ready rollouts, in order, to workers with room, one each in turn."""
    open_workers = [worker for worker in workers if state.table.free_slots(worker)]
    while open_workers:
        for worker in tuple(open_workers):
            rollout = _next_ready(state)
            if rollout is None:
                return
            _move(state, rollout, Event.LEASE)
            rollout.attempt += 1
            rollout.worker = worker
            state.table.grant(rollout.submission.rollout_id, rollout.attempt, worker, now_s)
            _record_event(state, effects, rollout, Event.LEASE, wall_ns)
            effects.sends.append(Send(worker, 0, _task(state, rollout)))
            if not state.table.free_slots(worker):
                open_workers.remove(worker)


def _next_ready(state: BrokerState) -> m.Rollout | None:
    while state.ready:
        _, rollout_id = heapq.heappop(state.ready)
        rollout = state.rollouts[rollout_id]
        if rollout.status is Status.QUEUED:
            return rollout
    return None


def _task(state: BrokerState, rollout: m.Rollout) -> m.Task:
    submission = rollout.submission
    claims = Claims(submission.rollout_id, rollout.attempt, submission.model, submission.overrides)
    return m.Task(
        rollout_id=submission.rollout_id,
        attempt=rollout.attempt,
        task=submission.task,
        token=mint(state.secret, claims),
        lease_s=state.table.lease_s,
        group=submission.group,
        labels=submission.labels,
    )


def _attempt_failed(
    state: BrokerState,
    effects: Effects,
    rollout: m.Rollout,
    error: str,
    retryable: bool,
    now_s: float,
    wall_ns: int,
    delay_s: float,
) -> None:
    """End a leased attempt without a result: back to the queue while attempts remain, else FAILED."""
    rollout.error = _shorten(error)
    if not retryable or rollout.attempt >= (rollout.submission.max_attempts or state.max_attempts):
        _end(state, effects, rollout, Event.FAIL, wall_ns)
        return
    state.table.end(rollout.submission.rollout_id)
    state.requeued += 1
    _move(state, rollout, Event.REQUEUE)
    if delay_s > 0:
        heapq.heappush(state.delayed, (now_s + delay_s, rollout.submission.rollout_id))
    else:
        heapq.heappush(state.ready, (rollout.order, rollout.submission.rollout_id))
    _record_event(state, effects, rollout, Event.REQUEUE, wall_ns, error=rollout.error)


def _end(state: BrokerState, effects: Effects, rollout: m.Rollout, event: Event, wall_ns: int) -> None:
    state.table.end(rollout.submission.rollout_id)
    _move(state, rollout, event)
    _record_event(state, effects, rollout, event, wall_ns, reward=rollout.reward, error=rollout.error)


def _move(state: BrokerState, rollout: m.Rollout, event: Event) -> None:
    state.counts[rollout.status] -= 1
    rollout.status = next_status(rollout.status, event)
    state.counts[rollout.status] += 1


def _record_event(
    state: BrokerState, effects: Effects, rollout: m.Rollout, what: str, wall_ns: int,
    *, reward: float | None = None, error: str = "", task: bytes = b"",
) -> None:  # fmt: skip
    """Log one step of a rollout's life and, in the same transaction, where it now stands."""
    submission = rollout.submission
    event = RolloutEvent(
        what=str(what), status=rollout.status.value, group=submission.group, worker=rollout.worker, reward=reward,
        error=error, labels=submission.labels, task=task,
    )  # fmt: skip
    _record(
        state, effects, Kind.ROLLOUT, wall_ns, encode(event), rollout_id=submission.rollout_id, attempt=rollout.attempt
    )
    effects.writes.append(Put(Table.ROLLOUTS, submission.rollout_id.encode(), encode(rollout)))


def _record(
    state: BrokerState, effects: Effects, kind: Kind, wall_ns: int, body: bytes, *, producer: str = "",
    epoch: int = 0, seq: int = 0, part: int = 0, rollout_id: str = "", attempt: int = 0, span_count: int = 0,
) -> None:  # fmt: skip
    effects.writes.append(
        Record(state.next_offset, kind, producer, epoch, seq, part, rollout_id, attempt, span_count, wall_ns, body)
    )
    state.next_offset += 1


def _append_spans(c: Context, rollout_id: str, attempt: int, count: int, blob: bytes, part: int) -> None:
    _record(
        c.state, c.effects, Kind.SPANS, c.wall_ns, blob, producer=c.peer, epoch=c.header.epoch, seq=c.header.seq,
        part=part, rollout_id=rollout_id, attempt=attempt, span_count=count,
    )  # fmt: skip


def _append_last_spans(c: Context, rollout: m.Rollout) -> None:
    """Spans that ride with DONE or FAIL: state and data commit together. Resends are caught by the rollout's status."""
    for part, blob in enumerate(c.blobs):
        _append_spans(c, rollout.submission.rollout_id, rollout.attempt, c.header.count, blob, part)


def _check_name(what: str, name: str) -> None:
    if not 0 < len(name.encode()) <= NAME_BYTES_MAX or "\0" in name:
        raise CallError(f"{what} name {name[:100]!r}: 1 to {NAME_BYTES_MAX} bytes without NUL are allowed")


def _check_blobs(blobs: Sequence[bytes]) -> None:
    """A record must fit into the message that carries it to a reader, or nobody could ever read past it."""
    for blob in blobs:
        if len(blob) > m.BLOB_BYTES_MAX:
            raise MessageTooLarge(
                f"{len(blob)} bytes exceed the limit of {m.BLOB_BYTES_MAX} for one record. Send several."
            )


def _check_last_spans(c: Context) -> None:
    if len(c.blobs) > 1:
        raise RemoteProtocolError(f"{c.header.op.name} carries one chunk of last spans, not {len(c.blobs)}")
    _check_blobs(c.blobs)


def _rollout(state: BrokerState, rollout_id: str) -> m.Rollout:
    rollout = state.rollouts.get(rollout_id)
    if rollout is None:
        raise NotFound(f"no rollout {rollout_id!r} was ever submitted to this broker")
    return rollout


def _is_running(state: BrokerState, rollout_id: str, attempt: int) -> bool:
    rollout = state.rollouts.get(rollout_id)
    return rollout is not None and rollout.status is Status.LEASED and rollout.attempt == attempt


def _must_hold(c: Context, rollout: m.Rollout, attempt: int) -> None:
    rollout_id = rollout.submission.rollout_id
    if c.state.table.holds(c.peer, rollout_id, attempt) is None:
        raise FencedError(
            f"rollout {rollout_id} attempt {attempt}: not held by {c.peer} any more; it is {rollout.status.value} at attempt "
            f"{rollout.attempt}. This result was not recorded. Heartbeat more often or raise [broker] lease_s "
            f"(now {c.state.table.lease_s:g})."
        )


def _shorten(error: str) -> str:
    if len(error) <= ERROR_CHARS_MAX:
        return error
    half = ERROR_CHARS_MAX // 2
    return f"{error[:half]}\n… {len(error) - 2 * half} characters cut …\n{error[-half:]}"
