"""Random histories against the broker's core, watched by a model that is too simple to be wrong.

Two submitters, three workers and two producers speak in any order; any message may be sent twice or much later, any
answer may be lost, time passes, and the broker may be restarted from what it has written at any moment.

Watched: each rollout ends at most once and terminal is final; attempts are numbered 1, 2, … and each has one holder;
nothing is recorded for an attempt but by its holder while it runs; a batch is in the log at most once, in order, and
exactly once when it was acknowledged; offsets are contiguous; counts add up; a broker restored from the log decides
as the one that wrote it. Not watched: that anything is ever finished (`drain` at the end does that), the disk, the
sockets.
"""

from __future__ import annotations

from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from lightning_bus import messages as m
from lightning_bus.lifecycle import Event, Status, next_status
from lightning_bus.log.codec import decode_event
from lightning_bus.records import Kind
from tests.core_harness import LEASE_S, Desk

WORKERS = ["w-0", "w-1", "w-2"]
PRODUCERS = ["g-0", "g-1"]
IDS = [f"r-{i}" for i in range(6)]
MAX_ATTEMPTS = 3

workers = st.sampled_from(WORKERS)
producers = st.sampled_from(PRODUCERS)


class Histories(RuleBasedStateMachine):
    @initialize()
    def start(self) -> None:
        self.desk = Desk(max_attempts=MAX_ATTEMPTS)
        self.sent: list[tuple[str, m.Body, list[bytes], dict[str, int]]] = []  # any of these may come again
        self.inbox: dict[str, list[m.Task]] = {worker: [] for worker in WORKERS}  # what reached the worker
        self.delivered = 0
        self.epochs = {producer: self.desk.hello(producer).epoch for producer in PRODUCERS}
        self.seqs = dict.fromkeys(PRODUCERS, 0)
        self.acked: list[bytes] = []  # blobs whose APPEND was acknowledged and not fenced
        self.ended: dict[str, tuple[str, int]] = {}  # accepted results: rollout → (worker, attempt)
        self.blobs = 0
        self.checked = 0  # records looked at so far
        self.lives: dict[str, tuple[Status | None, int, str]] = dict.fromkeys(IDS, (None, 0, ""))
        self.finished: Counter[str] = Counter()

    # -- what the world does

    @rule(ids=st.lists(st.sampled_from(IDS), min_size=1, max_size=3))
    def submit(self, ids: list[str]) -> None:
        self.say("t", m.Submit([m.Submission(i, i.encode()) for i in ids]))

    @rule(worker=workers, slots=st.integers(0, 3))
    def heartbeat(self, worker: str, slots: int) -> None:
        held = [m.Held(task.rollout_id, task.attempt) for task in self.inbox[worker]]
        answer = self.say(worker, m.Heartbeat(slots, held))
        assert isinstance(answer, m.Beat)
        lost = {(claim.rollout_id, claim.attempt) for claim in answer.lost}
        self.inbox[worker] = [task for task in self.inbox[worker] if (task.rollout_id, task.attempt) not in lost]

    @rule(worker=workers, keep=st.booleans(), data=st.data())
    def finish(self, worker: str, keep: bool, data: st.DataObject) -> None:
        """A worker reports; with `keep` it never sees the answer and thinks it still holds the attempt."""
        if not self.inbox[worker]:
            return
        task = data.draw(st.sampled_from(self.inbox[worker]))
        if not keep:
            self.inbox[worker].remove(task)
        kind = data.draw(st.sampled_from(["done", "fail", "final"]))
        body: m.Body = m.Done(task.rollout_id, task.attempt, 1.0)
        if kind != "done":
            body = m.Fail(task.rollout_id, task.attempt, "boom", retryable=kind == "fail")
        answer = self.say(worker, body, [self.blob()], count=1)
        if isinstance(answer, m.Accepted) and answer.fresh and (kind != "fail"):
            assert task.rollout_id not in self.ended
            self.ended[task.rollout_id] = worker, task.attempt

    @rule(ids=st.lists(st.sampled_from(IDS), min_size=1, max_size=2))
    def cancel(self, ids: list[str]) -> None:
        self.say("t", m.Cancel(ids))

    @rule(
        producer=producers,
        parts=st.lists(st.tuples(st.sampled_from([*IDS, ""]), st.integers(0, 3)), min_size=1, max_size=3),
    )
    def append(self, producer: str, parts: list[tuple[str, int]]) -> None:
        self.seqs[producer] += 1
        blobs = [self.blob() for _ in parts]
        body = m.Append([m.Part(rollout_id, attempt, 1) for rollout_id, attempt in parts])
        answer = self.say(producer, body, blobs, epoch=self.epochs[producer], seq=self.seqs[producer])
        assert isinstance(answer, m.Acked)
        assert not answer.duplicate
        self.acked += [blob for index, blob in enumerate(blobs) if index not in answer.fenced]

    @rule(producer=producers)
    def reconnect(self, producer: str) -> None:
        """A new incarnation of a producer takes over."""
        self.epochs[producer] = self.desk.hello(producer).epoch
        self.seqs[producer] = 0

    @rule(data=st.data())
    def say_again(self, data: st.DataObject) -> None:
        """The network, or a client that saw no answer, repeats anything that was ever said."""
        if self.sent:
            peer, body, blobs, header = data.draw(st.sampled_from(self.sent[-40:]))
            answer = self.desk.say(peer, body, blobs, **header)
            if isinstance(body, m.Append):
                assert isinstance(answer, m.Error) or (isinstance(answer, m.Acked) and answer.duplicate)

    @rule(after_s=st.sampled_from([0.1, 0.5, LEASE_S / 3, LEASE_S, 40.0]))
    def tick(self, after_s: float) -> None:
        self.desk.tick(after_s)

    @rule(lose=st.booleans())
    def deliver(self, lose: bool) -> None:
        """Tasks reach their workers, or are lost on the way."""
        tasks, self.delivered = self.desk.tasks[self.delivered :], len(self.desk.tasks)
        for worker, task in tasks:
            if not lose and task not in self.inbox[worker]:
                self.inbox[worker].append(task)

    @rule()
    def restart(self) -> None:
        self.desk.restart()

    # -- what must hold, always

    @invariant()
    def records_tell_a_legal_story(self) -> None:
        records = self.desk.log.records
        for record in records[self.checked :]:
            if record.kind is Kind.SPANS and record.rollout_id:
                status, attempt, worker = self.lives[record.rollout_id]
                assert status is Status.LEASED
                assert record.attempt == attempt
                assert record.producer in (worker, *PRODUCERS)
            elif record.kind is Kind.ROLLOUT:
                self.follow(record.rollout_id, record.attempt, decode_event(record).what, decode_event(record).worker)
        self.checked = len(records)
        assert self.desk.state.next_offset == len(records)

    @invariant()
    def acknowledged_spans_are_in_the_log_once(self) -> None:
        bodies = Counter(record.body for record in self.desk.log.records if record.kind is Kind.SPANS)
        assert all(count == 1 for count in bodies.values())
        assert set(self.acked) <= set(bodies)

    @invariant()
    def counts_add_up(self) -> None:
        state = self.desk.state
        assert Counter(rollout.status for rollout in state.rollouts.values()) == +state.counts
        leased = {i: r.attempt for i, r in state.rollouts.items() if r.status is Status.LEASED}
        assert leased == {i: lease.attempt for i, lease in state.table.leases.items()}
        assert all(i in state.table.held_by[lease.worker] for i, lease in state.table.leases.items())
        assert sum(map(len, state.table.held_by.values())) == len(leased)

    @invariant()
    def a_broker_restored_from_the_log_knows_the_same(self) -> None:
        live, restored = self.desk.state, self.desk.restored()
        assert restored.rollouts == live.rollouts
        assert restored.producers == live.producers
        assert restored.next_offset == live.next_offset
        assert +restored.counts == +live.counts
        holders = {i: (lease.worker, lease.attempt) for i, lease in live.table.leases.items()}
        assert {i: (lease.worker, lease.attempt) for i, lease in restored.table.leases.items()} == holders
        queued = {i for i, rollout in live.rollouts.items() if rollout.status is Status.QUEUED}
        assert {i for _, i in restored.ready} == queued
        assert {i for _, i in [*live.ready, *live.delayed]} >= queued

    def teardown(self) -> None:
        """However the history went, an honest worker can finish what is left."""
        for _ in range(MAX_ATTEMPTS * len(IDS) + 2):
            self.desk.tick(40.0)
            held = self.desk.held("honest")
            self.desk.beat("honest", len(IDS), *held)
            for rollout_id, attempt in self.desk.held("honest"):
                self.desk.say("honest", m.Done(rollout_id, attempt))
        self.records_tell_a_legal_story()
        for rollout_id, rollout in self.desk.state.rollouts.items():
            assert rollout.status.terminal
            assert self.finished[rollout_id] == 1
        for rollout_id, (worker, attempt) in self.ended.items():
            rollout = self.desk.state.rollouts[rollout_id]
            assert (rollout.worker, rollout.attempt) == (worker, attempt)

    # -- how

    def say(self, peer: str, body: m.Body, blobs: list[bytes] | None = None, **header: int) -> m.Body:
        self.sent.append((peer, body, blobs or [], header))
        return self.desk.say(peer, body, blobs, **header)

    def blob(self) -> bytes:
        self.blobs += 1
        return b"%d" % self.blobs

    def follow(self, rollout_id: str, attempt: int, what: str, worker: str) -> None:
        status, attempt_last, _ = self.lives[rollout_id]
        if what == "submit":
            assert status is None
            self.lives[rollout_id] = Status.QUEUED, 0, ""
            return
        assert status is not None
        assert not status.terminal
        assert attempt == attempt_last + (what == Event.LEASE)
        status = next_status(status, Event(what))
        self.finished[rollout_id] += status.terminal
        self.lives[rollout_id] = status, attempt, worker


Histories.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestHistories = Histories.TestCase
