"""What is on disk, watched: each transaction must continue every rollout's, batch's, cursor's and resource's life legally.

The ledger is written from docs/protocol.md and the design's promises and not from the broker's code: it has its own
table of moves, its own count of attempts, its own idea of who holds what. It is shown every transaction as it lands,
and asked by the oracle about what was told. What a record says about time it says in the broker's own time, however
somebody moved the wall clock (`virtual_time.decided_s`).

A check that fails raises Violation, whose text begins with the promise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from lightning_bus import messages as m
from lightning_bus.log.codec import decode_event, decode_record, encode_record
from lightning_bus.records import Delete, Kind, ProducerMark, Put, Record, RolloutEvent, Table, Write
from lightning_bus.resources import Resource
from tests.simulation.virtual_time import decided_s

TERMINAL = frozenset({"succeeded", "failed", "cancelled"})
MOVES = {
    ("queued", "lease"): "leased",
    ("queued", "cancel"): "cancelled",
    ("leased", "requeue"): "queued",
    ("leased", "nack"): "queued",
    ("leased", "release"): "queued",
    ("leased", "succeed"): "succeeded",
    ("leased", "fail"): "failed",
    ("leased", "cancel"): "cancelled",
}
NOTES = frozenset({"replay", "purge"})  # events of a dead letter, which stays what it is
REPLAY_OF = "replay_of"  # the label of a replay
AGEING_S = 60.0  # of waiting weigh as much as a level of priority
SOON_S = 1e-3  # moments that are one, given what a wall clock loses in a float


class Violation(AssertionError):
    """A promise was broken."""


@dataclass(frozen=True, slots=True)
class Report:
    """What a worker said of an attempt."""

    session: str
    what: str  # done, fail, final, nack, release
    delay_s: float = 0.0


@dataclass(slots=True)
class Life:
    """A rollout as the durable log tells it."""

    status: str = "queued"
    attempt: int = 0
    worker: str = ""  # of the newest attempt
    excused: int = 0  # attempts that were handed back
    reward: float | None = None
    submission: m.Submission | None = None
    been: set[tuple[str, int]] = field(default_factory=set[tuple[str, int]])
    holders: dict[int, str] = field(default_factory=dict[int, str])  # attempt → worker
    moved_s: float = 0.0  # when the last move was decided
    moved_by: int = 0  # and by which broker
    delays_s: tuple[float, float] = (0.0, 0.0)  # between which it may be delayed
    ready_s: float = 0.0  # while it is queued: not leased before
    ended_offset: int = 0
    ended_s: float = 0.0  # when its end was on disk
    replayed_as: str = ""
    purged: bool = False


class Ledger:
    """The durable half of one history."""

    def __init__(self, max_attempts: int, lease_s: float) -> None:
        self.max_attempts = max_attempts
        self.lease_s = lease_s
        self.now_s = 0.0  # told before each transaction
        self.broker = 0  # which one writes; counts from 1
        self.wall_moved_s: list[float] = []  # when somebody moved the wall clock
        self.weighed = True  # False: workers take by weight too, so priority alone does not tell who is next
        self.revoked: set[str] = set()  # workers whose leases may have been ended by somebody
        self.lives: dict[str, Life] = {}
        self.forgotten: dict[str, Life] = {}  # whose records were dropped
        self.keys: dict[str, str] = {}  # idempotency key → rollout
        self.spans: set[bytes] = set()  # chunks on disk
        self.marks: dict[str, ProducerMark] = {}
        self.cursors: dict[str, int] = {}
        self.resources: dict[bytes, Resource] = {}
        self.published_s: dict[tuple[str, int], float] = {}
        self.first_offset = 0  # of what the log still holds
        self.end_offset = 0
        self.unfinished: dict[str, None] = {}  # rollouts that have not ended, in order of submission
        self.issued: dict[bytes, tuple[str, int]] = {}  # chunk of an append → (session, its place in the order)
        self.reported: dict[bytes, tuple[str, int]] = {}  # last chunk → (rollout, attempt)
        self.reports: dict[tuple[str, int], list[Report]] = {}  # (rollout, attempt) → what was said of it
        self.refused: set[bytes] = set()  # chunks whose sender was told that they were not kept
        self.cursor_asked: dict[str, set[int]] = {}
        self.batch_last: dict[str, tuple[int, int, int]] = {}  # producer → (epoch, seq, part)
        self.leases: list[tuple[str, int, float]] = []  # rollout, broker, when it was decided
        self.brokers_s: dict[int, float] = {}  # when each broker started
        self._ordered: dict[str, int] = {}  # session → place of its newest chunk on disk
        self._ending: tuple[str, int, str] | None = None  # last spans on disk, their event not yet
        self._unstored: set[str] = set()  # rollouts whose event is on disk, their state not yet
        self._noted: dict[str, str] = {}  # in this transaction: rollout → note about it
        self._replays: dict[str, str] = {}  # in this transaction: letter → its replay

    def life(self, rollout_id: str) -> Life | None:
        """Return a rollout's life, whether or not its records are still there."""
        return self.lives.get(rollout_id) or self.forgotten.get(rollout_id)

    def committed(self, writes: Sequence[Write], now_s: float) -> None:
        """A transaction landed."""
        self.now_s = now_s
        for write in writes:
            if isinstance(write, Record):
                self._take_record(write)
            elif isinstance(write, Put):
                self._take_put(write)
            else:
                self._take_delete(write)
        check(self._ending is None, "state and data agree", "last spans without their event", self._ending)
        check(not self._unstored, "state and data agree", "an event without its state", self._unstored)
        self._replays_are_whole()

    # -- records

    def _take_record(self, record: Record) -> None:
        check(decode_record(encode_record(record)) == record, "records read as written", record.offset)
        check(record.offset == self.end_offset, "one order", record.offset, "where", self.end_offset, "is due")
        self.end_offset += 1
        if record.kind is Kind.ROLLOUT:
            self._take_event(record, decode_event(record))
        elif record.kind is Kind.SPANS:
            self._take_spans(record)

    def _take_event(self, record: Record, event: RolloutEvent) -> None:
        rollout_id, at_s = record.rollout_id, decided_s(record.wall_ns)
        self._unstored.add(rollout_id)
        ending, self._ending = self._ending, None
        life = self.lives.get(rollout_id)
        if event.what == "submit":
            check(life is None, "submitting again is a no-op", rollout_id)
            self.lives[rollout_id] = Life(been={("queued", 0)}, moved_s=at_s, moved_by=self.broker)
            self.unfinished[rollout_id] = None
            if REPLAY_OF in event.labels:
                self._replays[event.labels[REPLAY_OF]] = rollout_id
            return
        if life is None:
            raise Violation(f"each rollout is submitted first: {rollout_id} {event.what}")
        if event.what in NOTES:
            check(life.status == event.status == "failed", "only dead letters are replayed", rollout_id, life, event)
            self._noted[rollout_id] = event.what
            return
        check(life.status not in TERMINAL, "terminal is final", rollout_id, life.status, "then", event.what)
        status = MOVES.get((life.status, event.what))
        check(status == event.status, "moves are legal", rollout_id, life.status, event.what, event.status)
        due = life.attempt + (event.what == "lease")
        check(record.attempt == due, "attempts are 1, 2, …", rollout_id, event.what, record.attempt, "for", due)
        if event.what == "lease":
            self._take_lease(rollout_id, life, event, at_s)
        elif life.status == "leased":
            self._take_end_of_attempt(rollout_id, life, event, at_s, ending is not None)
        if ending is not None:
            check(
                ending == (rollout_id, record.attempt, life.worker) and event.what in ("succeed", "fail", "requeue"),
                "state and data agree", "last spans of", ending, "then", event.what, rollout_id, record.attempt,
            )  # fmt: skip
        # Every result reported in these histories carries last spans, so one without them was made up or torn.
        check(event.what != "succeed" or ending is not None, "state and data agree", rollout_id, "done without spans")
        life.status, life.attempt, life.reward = event.status, record.attempt, event.reward
        life.moved_s, life.moved_by = at_s, self.broker
        life.been.add((life.status, life.attempt))
        if life.status in TERMINAL:
            life.ended_offset, life.ended_s = record.offset, self.now_s
            del self.unfinished[rollout_id]

    def _take_lease(self, rollout_id: str, life: Life, event: RolloutEvent, at_s: float) -> None:
        submission = _submitted(rollout_id, life)
        attempt = life.attempt + 1
        limit = submission.max_attempts or self.max_attempts
        check(attempt - life.excused <= limit, "attempts are bounded", rollout_id, attempt, life.excused, limit)
        # A restart may let a delayed one go early when somebody moved the wall clock, from which it knows the rest.
        told = life.moved_by == self.broker or not any(life.moved_s <= s <= at_s for s in self.wall_moved_s)
        check(
            at_s >= life.ready_s - SOON_S or not told,
            "a delayed rollout is not leased early", rollout_id, attempt, f"{life.ready_s - at_s:.3f} s",
        )  # fmt: skip
        if self.weighed:
            for other_id in self.unfinished:
                other = self.lives[other_id]
                if other.status == "queued" and other.submission is not None and other.ready_s == other.moved_s:
                    above = other.submission.priority - submission.priority
                    check(
                        above <= 0 or other.moved_s > at_s - SOON_S or at_s - life.moved_s >= above * AGEING_S - SOON_S,
                        "higher priority goes first", rollout_id, submission.priority, "before", other_id, above,
                    )  # fmt: skip
        life.worker = life.holders[attempt] = event.worker
        self.leases.append((rollout_id, self.broker, at_s))

    def _take_end_of_attempt(self, rollout_id: str, life: Life, event: RolloutEvent, at_s: float, spans: bool) -> None:
        """Who ended the attempt, was it time to, and does it count?"""
        if event.what in ("succeed", "cancel"):
            return
        submission = _submitted(rollout_id, life)
        said = {report.what: report for report in self.reports.get((rollout_id, life.attempt), ())
                if report.session == life.worker}  # fmt: skip
        if event.what == "release":
            check("release" in said, "only the holder reports", rollout_id, life.attempt, "release", life.worker)
            life.excused += 1
        elif event.what == "nack":
            check("nack" in said, "only the holder reports", rollout_id, life.attempt, "nack", life.worker)
        elif not spans and "nack" not in said and life.worker not in self.revoked:
            # Silence, or too long a time. No attempt ends before one of them.
            lasts_s = submission.lease_s or self.lease_s
            if submission.timeout_s:
                lasts_s = min(lasts_s, submission.timeout_s)
            check(
                at_s - life.moved_s >= lasts_s - SOON_S, "a lease lasts", rollout_id, life.attempt, at_s - life.moved_s
            )
        counted, limit = life.attempt - life.excused, submission.max_attempts or self.max_attempts
        if event.status == "queued":
            check(counted < limit, "attempts are bounded", rollout_id, event.what, counted, "of", limit)
        elif not (spans and "final" in said):
            check(counted >= limit, "what can be tried again is", rollout_id, event.what, counted, "of", limit)
        if event.status == "queued":
            life.delays_s = _delays_s(life.attempt, event.what, said, spans)

    def _take_spans(self, record: Record) -> None:
        chunk, producer = record.body, record.producer
        check(self._ending is None, "state and data agree", "spans after last spans", self._ending)
        if record.seq == 0:
            self._take_last_spans(record)
            return
        batch, last = (record.epoch, record.seq, record.part), self.batch_last.get(producer, (0, 0, -1))
        check(last < batch, "batches are in order", producer, last, "then", batch)
        follows = batch[1] <= last[1] + 1 if batch[0] == last[0] else batch[1] == 1
        check(follows, "batches leave no gap", producer, last, "then", batch)
        self.batch_last[producer] = batch
        if record.span_count == 0:
            return  # the trace of a batch that was fenced as a whole
        self._take_chunk(record)
        session, place = self.issued[chunk]
        check(session == producer, "spans are filed as sent", session, producer)
        check(self._ordered.get(session, -1) < place, "order per producer", session, place, self._ordered)
        self._ordered[session] = place

    def _take_last_spans(self, record: Record) -> None:
        self._take_chunk(record)
        said = self.reported[record.body]
        check(said == (record.rollout_id, record.attempt), "spans are filed as sent", said, record)
        holder = self.lives[record.rollout_id].worker
        check(record.producer == holder, "only the holder reports", record.producer, "for", holder, *said)
        self._ending = (*said, record.producer)

    def _take_chunk(self, record: Record) -> None:
        chunk, producer = record.body, record.producer
        check(chunk not in self.spans, "nothing is appended twice", producer, record.epoch, record.seq, record.offset)
        check(chunk not in self.refused, "a refused span is never recorded", producer, record.offset)
        self.spans.add(chunk)
        if record.rollout_id:
            life = self.lives.get(record.rollout_id)
            check(
                life is not None and (life.status, life.attempt) == ("leased", record.attempt),
                "fenced results are never recorded", record.rollout_id, record.attempt, "while", life,
            )  # fmt: skip

    # -- tables

    def _take_put(self, put: Put) -> None:
        if put.table is Table.ROLLOUTS:
            self._take_rollout(put.key.decode(), msgspec.msgpack.decode(put.value, type=m.Rollout))
        elif put.table is Table.STANDINGS:
            self._take_standing(put.key.decode(), msgspec.msgpack.decode(put.value, type=m.Standing))
        elif put.table is Table.PRODUCERS:
            key, mark = put.key.decode(), msgspec.msgpack.decode(put.value, type=ProducerMark)
            last = self.marks.get(key, ProducerMark(0))
            check((mark.epoch, mark.seq) >= (last.epoch, last.seq), "marks never go back", key, last, mark)
            self.marks[key] = mark
        elif put.table is Table.CURSORS:
            key, offset = put.key.decode(), msgspec.msgpack.decode(put.value, type=int)
            last = self.cursors.get(key, 0)
            check(last <= offset <= self.end_offset, "a cursor never goes back", key, last, "to", offset)
            check(offset in self.cursor_asked.get(key, ()), "a cursor never skips", key, "to", offset)
            self.cursors[key] = offset
        else:
            resource = msgspec.msgpack.decode(put.value, type=Resource)
            check(put.key not in self.resources, "resources are immutable", resource.name, resource.version)
            self.resources[put.key] = resource
            self.published_s[resource.name, resource.version] = self.now_s

    def _take_rollout(self, rollout_id: str, rollout: m.Rollout) -> None:
        life = self.lives[rollout_id]
        if life.submission is None:
            submission = life.submission = rollout.submission
            check(submission.rollout_id == rollout_id, "state and data agree", rollout_id, submission)
            life.delays_s = submission.delay_s, submission.delay_s
            if submission.key:
                known = self.keys.setdefault(submission.key, rollout_id)
                check(known == rollout_id, "one rollout an idempotency key", submission.key, known, rollout_id)
        check(rollout.submission == life.submission, "what was submitted stays", rollout_id)
        self._stands(rollout_id, rollout)

    def _take_standing(self, rollout_id: str, standing: m.Standing) -> None:
        self._stands(rollout_id, standing)

    def _stands(self, rollout_id: str, told: m.Rollout | m.Standing) -> None:
        life = self.lives[rollout_id]
        stands = (str(told.status), told.attempt, told.excused)
        check(stands == (life.status, life.attempt, life.excused), "state and data agree", rollout_id, stands, life)
        if life.status in TERMINAL:
            check(told.ended_offset == life.ended_offset, "state and data agree", rollout_id, told.ended_offset, life)
        elif life.status == "queued":
            least_s, most_s = life.delays_s
            check(least_s <= told.delay_s <= most_s, "delays are as asked", rollout_id, told.delay_s, life)
            life.ready_s = life.moved_s + told.delay_s
        self._unstored.discard(rollout_id)
        note = self._noted.pop(rollout_id, "")
        if note == "purge":
            life.purged = True
        elif note == "replay":
            check(not life.replayed_as, "one replay a dead letter", rollout_id, life.replayed_as, told.replayed_as)
            life.replayed_as = told.replayed_as
        marks = (told.replayed_as, told.purged)
        check(marks == (life.replayed_as, life.purged), "state and data agree", rollout_id, marks, life)

    def _replays_are_whole(self) -> None:
        """A letter and its replay name each other, in one transaction, and the task is the same."""
        for letter_id, replay_id in self._replays.items():
            letter, replay = self.lives[letter_id], self.lives[replay_id]
            check(letter.replayed_as == replay_id, "one replay a dead letter", letter_id, letter.replayed_as, replay_id)
            mine, its = _submitted(letter_id, letter), _submitted(replay_id, replay)
            check(mine.task == its.task, "a replay is of the same task", letter_id, mine.task, replay_id, its.task)
        self._replays.clear()
        check(not self._noted, "state and data agree", "a note without its state", self._noted)

    def _take_delete(self, delete: Delete) -> None:
        check(delete.table in (Table.ROLLOUTS, Table.STANDINGS), "only old rollouts are forgotten", delete)
        rollout_id = delete.key.decode()
        if delete.table is Table.STANDINGS and rollout_id not in self.lives:
            return
        life = self.lives.pop(rollout_id, None) or self.forgotten[rollout_id]
        check(
            life.status in TERMINAL and life.ended_offset < self.first_offset,
            "only old rollouts are forgotten", rollout_id, life, "the log begins at", self.first_offset,
        )  # fmt: skip
        self.forgotten[rollout_id] = life
        key = life.submission.key if life.submission is not None else ""
        if key and self.keys.get(key) == rollout_id:
            del self.keys[key]


def check(holds: bool, promise: str, *facts: object) -> None:
    """Raise Violation when a promise does not hold."""
    if not holds:
        raise Violation(f"{promise}: {' '.join(map(str, facts))}")


def _delays_s(attempt: int, what: str, said: dict[str, Report], spans: bool) -> tuple[float, float]:
    """Return between which limits a rollout is delayed that comes back from an attempt."""
    if what == "nack":
        return said["nack"].delay_s, said["nack"].delay_s
    if what == "release":
        return 0.0, 0.0
    backoff_s = min(30.0, 0.5 * 2.0 ** (attempt - 1))
    return 0.75 * backoff_s if spans else 0.0, 1.25 * backoff_s


def _submitted(rollout_id: str, life: Life) -> m.Submission:
    if life.submission is None:
        raise Violation(f"state and data agree: {rollout_id} moved before its submission was stored")
    return life.submission
