"""The moves of a rollout's life: leased, handed back, ended. Whatever changes where a rollout stands is here.

What always holds. Each move goes through `move`, and so through the table in `lifecycle`; it writes one event into
the log and, in the same transaction, where the rollout now stands. A rollout has at most one lease. An attempt number
is written before the task that carries it is sent, so that it never names two holders, whatever crashes.
"""

from __future__ import annotations

import hashlib

from lightning_bus import messages as m
from lightning_bus.broker.effects import Effects, Send
from lightning_bus.broker.state import BrokerState, encode, record
from lightning_bus.broker.waits import end_of
from lightning_bus.lifecycle import Event, Status, next_status
from lightning_bus.records import Kind, Put, RolloutEvent, Table
from lightning_bus.tokens import Claims, mint

ERROR_CHARS_MAX = 16_384  # a traceback; what is cut is its middle, which nobody misses
RETRY_DELAY_S = 0.5  # doubles with each attempt
RETRY_DELAY_MAX_S = 30.0
RETRY_JITTER = 0.25  # either way, or a thousand rollouts that failed together would come back together
TOKEN_LIFE_S = 7 * 86_400.0  # of an attempt without a time limit, which beats may keep alive for days
TOKEN_GRACE_S = 300.0  # beyond an attempt's time limit: clocks of two machines differ, and last spans come late
STALE_MAX = 10_000  # entries of cancelled rollouts that the line may hold beside what is queued


def enqueue(state: BrokerState, rollout: m.Rollout, now_s: float) -> None:
    """Let a queued rollout wait for a worker."""
    submission = rollout.submission
    state.ready.push(
        submission.rollout_id, group=submission.group, priority=submission.priority, order=rollout.order, now_s=now_s
    )


def enqueue_delayed(state: BrokerState, now_s: float) -> None:
    """Let those wait for a worker whose time has come."""
    for rollout_id in state.delayed.due(now_s):
        enqueue(state, state.rollouts[rollout_id], now_s)


def dispatch(state: BrokerState, effects: Effects, now_s: float, wall_ns: int) -> None:
    """Lease what is ready, in order, to workers with room, one each in turn."""
    open_workers = state.table.open
    if state.draining:
        return
    too_full: list[str] = []  # workers that have a slot, but not the bytes for what is next
    while open_workers:
        rollout = _next_ready(state, now_s)
        if rollout is None:
            break
        task_bytes = len(rollout.submission.task)
        while open_workers:
            worker = next(iter(open_workers))
            if state.table.has_room(worker, task_bytes):
                _lease(state, effects, rollout, worker, now_s, wall_ns)
                break
            del open_workers[worker]
            too_full.append(worker)
        else:
            # It keeps its place: were smaller ones let past, a large one might wait for ever.
            state.next_up = rollout.submission.rollout_id
    for worker in too_full:
        open_workers[worker] = None


def _lease(state: BrokerState, effects: Effects, rollout: m.Rollout, worker: str, now_s: float, wall_ns: int) -> None:
    submission = rollout.submission
    move(state, rollout, Event.LEASE)
    rollout.attempt += 1
    rollout.worker_before, rollout.worker = rollout.worker, worker
    rollout.ready_wall_ns, rollout.delay_s = 0, 0.0
    state.table.grant(
        submission.rollout_id, rollout.attempt, worker, now_s, lease_s=submission.lease_s,
        timeout_s=submission.timeout_s, task_bytes=len(submission.task),
    )  # fmt: skip
    record_event(state, effects, rollout, Event.LEASE, wall_ns)
    effects.sends.append(Send(worker, 0, task_of(state, rollout, wall_ns)))


def _next_ready(state: BrokerState, now_s: float) -> m.Rollout | None:
    if not state.ready and state.next_up is None:
        return None

    def is_queued(rollout_id: str) -> bool:
        rollout = state.rollouts.live(rollout_id)
        # A delayed one may have an entry from before: forgotten by retention and submitted again.
        return rollout is not None and rollout.status is Status.QUEUED and rollout_id not in state.delayed

    rollout_id, state.next_up = state.next_up, None
    if rollout_id is None or not is_queued(rollout_id):
        rollout_id = state.ready.pop(now_s, is_queued)
    return None if rollout_id is None else state.rollouts[rollout_id]


def task_of(state: BrokerState, rollout: m.Rollout, wall_ns: int) -> m.Task:
    """Return the TASK of the newest attempt."""
    submission = rollout.submission
    life_s = submission.timeout_s + TOKEN_GRACE_S if submission.timeout_s > 0 else TOKEN_LIFE_S
    expires_wall_s = wall_ns // 1_000_000_000 + life_s
    claims = Claims(submission.rollout_id, rollout.attempt, submission.model, submission.overrides, expires_wall_s)
    return m.Task(
        submission.rollout_id, rollout.attempt, submission.task, mint(state.secret, claims),
        submission.lease_s or state.table.lease_s, submission.group, submission.labels, submission.timeout_s,
    )  # fmt: skip


def attempt_failed(
    state: BrokerState, effects: Effects, rollout: m.Rollout, error: str, now_s: float, wall_ns: int, *,
    delay_s: float, retryable: bool = True, event: Event = Event.REQUEUE,
) -> None:  # fmt: skip
    """End a leased attempt without a result: back to the queue while attempts remain, else FAILED."""
    rollout.error = shorten(error)
    attempts_max = rollout.submission.max_attempts or state.max_attempts
    if retryable and rollout.attempt - rollout.excused < attempts_max:
        requeue(state, effects, rollout, event, now_s, wall_ns, delay_s=delay_s)
    else:
        end(state, effects, rollout, Event.FAIL, wall_ns)


def requeue(
    state: BrokerState,
    effects: Effects,
    rollout: m.Rollout,
    event: Event,
    now_s: float,
    wall_ns: int,
    *,
    delay_s: float,
) -> None:
    """End a leased attempt; the rollout is leased again when `delay_s` is over."""
    state.table.end(rollout.submission.rollout_id)
    state.requeued += 1
    move(state, rollout, event)
    if delay_s > 0:
        rollout.delay_s, rollout.ready_wall_ns = delay_s, wall_ns + int(delay_s * 1e9)
        state.delayed.set(rollout.submission.rollout_id, now_s + delay_s)
    else:
        enqueue(state, rollout, now_s)
    record_event(state, effects, rollout, event, wall_ns, error=rollout.error)


def lose_lease(
    state: BrokerState, effects: Effects, rollout_id: str, error: str, now_s: float, wall_ns: int, *, delay_s: float
) -> None:
    """End an attempt that its worker did not end: what that still sends is late, and not a resend."""
    rollout = state.rollouts[rollout_id]
    rollout.worker = ""
    attempt_failed(state, effects, rollout, error, now_s, wall_ns, delay_s=delay_s)


def end(state: BrokerState, effects: Effects, rollout: m.Rollout, event: Event, wall_ns: int) -> None:
    """End a rollout for good."""
    rollout_id = rollout.submission.rollout_id
    state.table.end(rollout_id)
    state.delayed.discard(rollout_id)
    move(state, rollout, event)
    rollout.ended_offset = state.next_offset
    rollout.ready_wall_ns, rollout.delay_s = 0, 0.0
    record_event(state, effects, rollout, event, wall_ns, reward=rollout.reward, error=rollout.error)
    state.finished.append(rollout_id)
    if state.waits:
        state.waits.note_end(end_of(rollout))
    if event is Event.FAIL:
        state.dead[rollout_id] = None  # it can be replayed, so it keeps its task
    else:
        state.rollouts.pack(rollout_id)


def sweep(state: BrokerState, now_s: float) -> None:
    """Make the line anew when most of it is stale, or rollouts that come and are cancelled would fill the memory."""
    if len(state.ready) > 2 * state.counts[Status.QUEUED] + STALE_MAX:
        state.ready = type(state.ready)()
        state.next_up = None
        for rollout in state.rollouts.unpacked():
            if rollout.status is Status.QUEUED and rollout.submission.rollout_id not in state.delayed:
                enqueue(state, rollout, now_s)


def move(state: BrokerState, rollout: m.Rollout, event: Event) -> None:
    """Let a rollout stand where the event leads."""
    state.counts[rollout.status] -= 1
    rollout.status = next_status(rollout.status, event)
    state.counts[rollout.status] += 1


def is_running(state: BrokerState, rollout_id: str, attempt: int) -> bool:
    lease = state.table.leases.get(rollout_id)
    return lease is not None and lease.attempt == attempt


def record_event(
    state: BrokerState, effects: Effects, rollout: m.Rollout, what: str, wall_ns: int, *,
    reward: float | None = None, error: str = "",
) -> None:  # fmt: skip
    """Log one step of a rollout's life and, in the same transaction, where it now stands."""
    submission = rollout.submission
    rollout_id = submission.rollout_id
    event = RolloutEvent(what, rollout.status, submission.group, rollout.worker, reward, error, submission.labels)
    record(state, effects, Kind.ROLLOUT, wall_ns, encode(event), rollout_id=rollout_id, attempt=rollout.attempt)
    standing = m.Standing(
        rollout.status, rollout.attempt, rollout.worker, rollout.reward, rollout.error, rollout.order,
        rollout.excused, rollout.ready_wall_ns, rollout.ended_offset, rollout.replayed_as, rollout.purged,
        rollout.delay_s, rollout.worker_before,
    )  # fmt: skip
    effects.writes.append(Put(Table.STANDINGS, rollout_id.encode(), encode(standing)))


def retry_delay_s(rollout_id: str, attempt: int) -> float:
    """Return how long a rollout waits after an attempt that failed: 0.5 s, 1 s, 2 s … 30 s, each ± 25 %.

    The jitter is a function of its arguments, so that a history can be played again.
    """
    delay_s = min(RETRY_DELAY_MAX_S, RETRY_DELAY_S * 2.0 ** min(attempt - 1, 16))
    chance = hashlib.blake2b(f"{rollout_id} {attempt}".encode(), digest_size=4).digest()
    return delay_s * (1 + RETRY_JITTER * (int.from_bytes(chance, "big") / (1 << 31) - 1))


def shorten(error: str) -> str:
    if len(error) <= ERROR_CHARS_MAX:
        return error
    half = ERROR_CHARS_MAX // 2
    return f"{error[:half]}\n… {len(error) - 2 * half} characters cut …\n{error[-half:]}"
