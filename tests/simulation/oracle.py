"""The promises, watched. The oracle sees every transaction as it lands, and hears everything that a client was told.

It keeps its own ledger, written from docs/protocol.md and the design's promises and not from the broker's code: its
own table of moves, its own idea of who holds what. Two kinds of checks:

    what is on disk     each transaction continues every rollout's, producer's, cursor's and resource's life legally
    what was told       an answer tells only what is on disk, and what is on disk never contradicts an answer

A check that fails raises Violation, whose text names the promise.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import msgspec

from lightning_bus import messages as m
from lightning_bus.broker.core import BrokerState
from lightning_bus.errors import LightningBusError
from lightning_bus.log.codec import decode_event, decode_record, encode_record
from lightning_bus.records import Kind, ProducerMark, Put, Record, Table, Write
from lightning_bus.resources import Resource

TERMINAL = frozenset({"succeeded", "failed", "cancelled"})
MOVES = {
    ("queued", "lease"): "leased",
    ("queued", "cancel"): "cancelled",
    ("leased", "requeue"): "queued",
    ("leased", "succeed"): "succeeded",
    ("leased", "fail"): "failed",
    ("leased", "cancel"): "cancelled",
}


class Violation(AssertionError):
    """A promise was broken."""


@dataclass(slots=True)
class Life:
    """A rollout as the durable log tells it."""

    status: str = "queued"
    attempt: int = 0
    worker: str = ""  # of the newest attempt
    been: set[tuple[str, int]] = field(default_factory=set[tuple[str, int]])
    holders: dict[int, str] = field(default_factory=dict[int, str])  # attempt → worker


class Oracle:
    """One history, checked while it happens."""

    def __init__(self, max_attempts: int) -> None:
        self.max_attempts = max_attempts
        self.lives: dict[str, Life] = {}
        self.spans: set[bytes] = set()  # chunks on disk
        self.marks: dict[str, ProducerMark] = {}
        self.cursors: dict[str, int] = {}
        self.resources: dict[bytes, Resource] = {}
        self.end_offset = 0
        self._batch_last: dict[str, tuple[int, int, int]] = {}  # producer → (epoch, seq, part)
        self._issued: dict[bytes, tuple[str, int]] = {}  # chunk of an append → (session, its place in the order)
        self._ordered: dict[str, int] = {}  # session → place of its newest chunk on disk
        self._reported: dict[bytes, tuple[str, str, int, str]] = {}  # last chunk → (session, rollout, attempt, what)
        self._refused: set[bytes] = set()  # chunks whose sender was told that they were not kept
        self._cursor_asked: dict[str, set[int]] = {}
        self._cursor_told: dict[str, int] = {}
        self._ending: tuple[str, int, str] | None = None  # last spans on disk, their event not yet
        self._unstored: set[str] = set()  # rollouts whose event is on disk, their state not yet

    # -- what is on disk

    def committed(self, writes: Sequence[Write]) -> None:
        """A transaction landed."""
        for write in writes:
            if isinstance(write, Record):
                self._take_record(write)
            else:
                self._take_put(write)
        _check(self._ending is None, "state and data agree", "last spans without their event", self._ending)
        _check(not self._unstored, "state and data agree", "an event without its state", self._unstored)

    def _take_record(self, record: Record) -> None:
        _check(decode_record(encode_record(record)) == record, "records read as written", record.offset)
        _check(record.offset == self.end_offset, "one order", record.offset, "where", self.end_offset, "is due")
        self.end_offset += 1
        if record.kind is Kind.ROLLOUT:
            self._take_event(record)
        elif record.kind is Kind.SPANS:
            self._take_spans(record)

    def _take_event(self, record: Record) -> None:
        event, rollout_id = decode_event(record), record.rollout_id
        _check(rollout_id not in self._unstored, "state and data agree", rollout_id, "moved twice, stored never")
        self._unstored.add(rollout_id)
        ending, self._ending = self._ending, None
        life = self.lives.get(rollout_id)
        if event.what == "submit":
            _check(life is None, "submitting again is a no-op", rollout_id)
            life = self.lives[rollout_id] = Life()
            life.been.add(("queued", 0))
            return
        if life is None:
            raise Violation(f"each rollout is submitted first: {rollout_id} {event.what}")
        _check(life.status not in TERMINAL, "terminal is final", rollout_id, life.status, "then", event.what)
        status = MOVES.get((life.status, event.what))
        _check(status == event.status, "moves are legal", rollout_id, life.status, event.what, event.status)
        due = life.attempt + (event.what == "lease")
        _check(record.attempt == due, "attempts are 1, 2, …", rollout_id, event.what, record.attempt, "for", due)
        _check(record.attempt <= self.max_attempts, "attempts are bounded", rollout_id, record.attempt)
        if event.what == "lease":
            life.worker = life.holders[due] = event.worker
        if ending is not None:
            _check(
                ending == (rollout_id, record.attempt, life.worker) and event.what in ("succeed", "fail", "requeue"),
                "state and data agree", "last spans of", ending, "then", event.what, rollout_id, record.attempt,
            )  # fmt: skip
        # Every result reported in these histories carries last spans, so one without them was made up or torn.
        _check(event.what != "succeed" or ending is not None, "state and data agree", rollout_id, "done without spans")
        life.status, life.attempt = event.status, record.attempt
        life.been.add((life.status, life.attempt))

    def _take_spans(self, record: Record) -> None:
        chunk, producer = record.body, record.producer
        _check(self._ending is None, "state and data agree", "spans after last spans", self._ending)
        _check(chunk not in self.spans, "nothing is appended twice", producer, record.epoch, record.seq, record.offset)
        _check(chunk not in self._refused, "a refused span is never recorded", producer, record.offset)
        self.spans.add(chunk)
        if record.rollout_id:
            life = self.lives.get(record.rollout_id)
            _check(
                life is not None and (life.status, life.attempt) == ("leased", record.attempt),
                "fenced results are never recorded", record.rollout_id, record.attempt, "while", life,
            )  # fmt: skip
        if record.seq == 0:
            session, rollout_id, attempt, _ = self._reported[chunk]
            said = (session, rollout_id, attempt)
            _check(said == (producer, record.rollout_id, record.attempt), "spans are filed as sent", said, record)
            holder = self.lives[rollout_id].worker
            _check(producer == holder, "only the holder reports", producer, "for", holder, rollout_id, attempt)
            self._ending = (rollout_id, attempt, producer)
            return
        session, place = self._issued[chunk]
        _check(session == producer, "spans are filed as sent", session, producer)
        _check(self._ordered.get(session, -1) < place, "order per producer", session, place, self._ordered)
        self._ordered[session] = place
        batch, last = (record.epoch, record.seq, record.part), self._batch_last.get(producer)
        _check(last is None or last < batch, "batches are in order", producer, last, "then", batch)
        self._batch_last[producer] = batch

    def _take_put(self, put: Put) -> None:
        key = put.key.decode()
        if put.table is Table.ROLLOUTS:
            rollout, life = msgspec.msgpack.decode(put.value, type=m.Rollout), self.lives[key]
            stands = (str(rollout.status), rollout.attempt)
            _check(stands == (life.status, life.attempt), "state and data agree", key, stands, life)
            self._unstored.discard(key)
        elif put.table is Table.PRODUCERS:
            mark = msgspec.msgpack.decode(put.value, type=ProducerMark)
            last = self.marks.get(key, ProducerMark(0))
            _check((mark.epoch, mark.seq) >= (last.epoch, last.seq), "marks never go back", key, last, mark)
            self.marks[key] = mark
        elif put.table is Table.CURSORS:
            offset, last = msgspec.msgpack.decode(put.value, type=int), self.cursors.get(key, 0)
            _check(last <= offset <= self.end_offset, "a cursor never goes back", key, last, "to", offset)
            _check(offset in self._cursor_asked.get(key, ()), "a cursor never skips", key, "to", offset)
            self.cursors[key] = offset
        else:
            resource = msgspec.msgpack.decode(put.value, type=Resource)
            _check(put.key not in self.resources, "resources are immutable", resource.name, resource.version)
            self.resources[put.key] = resource

    # -- what was told

    def sent_task(self, worker: str, task: m.Task) -> None:
        """A TASK left the broker."""
        life = self.lives.get(task.rollout_id)
        holder = None if life is None else life.holders.get(task.attempt)
        _check(holder == worker, "an attempt is on disk before it is sent, and has one holder",
               task.rollout_id, task.attempt, "sent to", worker, "held by", holder)  # fmt: skip

    def appending(self, session: str, chunk: bytes) -> None:
        """A client was asked to append; its chunks are in the order of these calls."""
        self._issued[chunk] = session, len(self._issued)

    def appended(self, chunk: bytes) -> None:
        _check(chunk in self.spans, "an acknowledged span is on disk", self._issued[chunk])

    def not_kept(self, chunk: bytes) -> None:
        """A client was told that its spans were fenced."""
        _check(chunk not in self.spans, "fenced means not recorded", self._issued.get(chunk), self._reported.get(chunk))
        self._refused.add(chunk)

    def reporting(self, session: str, rollout_id: str, attempt: int, what: str, chunk: bytes) -> None:
        self._reported[chunk] = session, rollout_id, attempt, what

    def reported(self, chunk: bytes) -> None:
        session, rollout_id, attempt, what = self._reported[chunk]
        life = self.lives[rollout_id]
        _check(chunk in self.spans, "an acknowledged result is on disk", rollout_id, attempt, what)
        _check(life.holders[attempt] == session, "only the holder reports", rollout_id, attempt, session)
        ends = {"done": {"succeeded"}, "fail": {"queued", "failed"}, "final": {"failed"}}[what]
        _check(
            any((end, attempt) in life.been for end in ends), "an acknowledged result stands", rollout_id, attempt, life
        )

    def submitted(self, rollout_ids: Iterable[str]) -> None:
        for rollout_id in rollout_ids:
            _check(rollout_id in self.lives, "an acknowledged rollout is on disk", rollout_id)

    def cancelled(self, rollout_ids: Iterable[str]) -> None:
        for rollout_id in rollout_ids:
            _check(self.lives[rollout_id].status in TERMINAL, "cancelled is over", rollout_id)

    def seen(self, rollouts: Iterable[m.Rollout]) -> None:
        """A QUERY was answered."""
        for rollout in rollouts:
            life = self.lives.get(rollout.submission.rollout_id)
            stands = (str(rollout.status), rollout.attempt)
            _check(life is not None and stands in life.been, "only what is on disk is told", stands, life)

    def counted(self, status: m.StatusIs) -> None:
        _check(sum(status.rollouts.values()) <= len(self.lives), "counts add up", status)
        _check(all(count >= 0 for count in status.rollouts.values()), "counts add up", status)
        _check(status.held == status.rollouts["leased"], "counts add up", status)
        _check(status.next_offset <= self.end_offset, "only what is on disk is told", status)

    def published(self, resource: Resource) -> None:
        _check(resource in self.resources.values(), "an acknowledged resource is on disk", resource)

    def moving_cursor(self, name: str, offset: int) -> None:
        self._cursor_asked.setdefault(name, set()).add(offset)

    def cursor_at(self, name: str, offset: int) -> None:
        """A consumer, of which there is one a name, was told where its cursor is."""
        _check(offset <= self.cursors.get(name, 0), "an acknowledged cursor is on disk", name, offset)
        _check(offset >= self._cursor_told.get(name, 0), "a cursor never goes back", name, offset)
        self._cursor_told[name] = offset

    def fetched(self, offset: int, records: Sequence[Record], next_offset: int, end_offset: int) -> None:
        """A reader asked for `offset` and got these."""
        due = list(range(offset, offset + len(records)))
        _check([record.offset for record in records] == due, "a reader never skips", offset, len(records))
        _check(next_offset == offset + len(records), "a reader never skips", offset, next_offset)
        _check(end_offset <= self.end_offset and next_offset <= max(offset, end_offset),
               "only what is on disk is told", next_offset, end_offset)  # fmt: skip

    # -- the broker's own state

    def restored(self, state: BrokerState) -> None:
        """A broker opened the log: it must know what the ledger knows."""
        stands = {i: (str(rollout.status), rollout.attempt) for i, rollout in state.rollouts.items()}
        told = {i: (life.status, life.attempt) for i, life in self.lives.items()}
        _check(stands == told, "a broker knows what its log tells", stands, told)
        _check(state.next_offset == self.end_offset, "a broker knows what its log tells", state.next_offset)
        _check(state.producers == self.marks, "a broker knows what its log tells", state.producers, self.marks)
        _check(state.cursors == self.cursors, "a broker knows what its log tells", state.cursors, self.cursors)
        versions = [resource for by_version in state.resources.values() for resource in by_version.values()]
        _check(len(versions) == len(self.resources), "a broker knows what its log tells", versions)
        for producer, (epoch, seq, _) in self._batch_last.items():
            mark = state.producers[producer]
            _check((mark.epoch, mark.seq) >= (epoch, seq), "the dedup mark is as new as the log", producer, mark, seq)
        self.consistent(state)

    def consistent(self, state: BrokerState) -> None:
        """What holds between any two decisions."""
        rollouts, leases = state.rollouts, state.table.leases
        counts = Counter(rollout.status for rollout in rollouts.values())
        _check(counts == +state.counts, "counts add up", counts, state.counts)
        _check(len(leases) == counts["leased"], "one lease a leased rollout", leases)  # type: ignore[index]
        for rollout_id, lease in leases.items():
            rollout = rollouts[rollout_id]
            _check(
                rollout.status == "leased" and (rollout.attempt, rollout.worker) == (lease.attempt, lease.worker),
                "one lease a leased rollout", lease, rollout,
            )  # fmt: skip
        _check(
            sum(map(len, state.table.held_by.values())) == len(leases),
            "one lease a leased rollout",
            state.table.held_by,
        )

    def same(self, live: BrokerState, restored: BrokerState) -> None:
        """With nothing under way, a broker that opened the log now would know what this one knows."""
        for name in ("rollouts", "producers", "cursors", "resources", "next_offset"):
            mine, theirs = getattr(live, name), getattr(restored, name)
            _check(mine == theirs, "memory and disk agree", name, mine, theirs)
        holders = [{i: (x.worker, x.attempt) for i, x in s.table.leases.items()} for s in (live, restored)]
        _check(holders[0] == holders[1], "memory and disk agree", "leases", *holders)
        queued = {i for i, rollout in live.rollouts.items() if rollout.status == "queued"}
        _check({i for _, i in [*live.ready, *live.delayed]} >= queued, "what is queued will be leased", queued)
        _check({i for _, i in [*restored.ready, *restored.delayed]} >= queued, "what is queued will be leased", queued)

    @property
    def unfinished(self) -> list[str]:
        return [rollout_id for rollout_id, life in self.lives.items() if life.status not in TERMINAL]


def is_session_over(error: LightningBusError) -> bool:
    """True when a producer was told that a successor took its name: its last batch may well be recorded."""
    return "session is over" in str(error)


def _check(holds: bool, promise: str, *facts: object) -> None:
    if not holds:
        raise Violation(f"{promise}: {' '.join(map(str, facts))}")
