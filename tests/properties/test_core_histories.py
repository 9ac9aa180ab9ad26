"""Random histories against the broker's core, watched by a model that is too simple to be wrong.

A submitter, three workers, two producers and one who waits speak in any order; any message may be sent twice or much
later, any answer may be lost, time passes, and the broker may be restarted from what it has written at any moment.

Watched: each rollout ends at most once and terminal is final; attempts are numbered 1, 2, … and each has one holder;
no more attempts than allowed count; nothing is recorded for an attempt but by its holder while it runs; a batch is in
the log at most once, in order, and exactly once when it was acknowledged, and every number leaves a record; offsets
are contiguous; counts add up; an idempotency key is one rollout; who waits is told each end once; a dead letter is
listed until it is replayed or purged, once; a broker restored from the log decides as the one that wrote it. Not
watched: that anything is ever finished (`teardown` does that), roles, retention, the disk, the sockets.
"""

from __future__ import annotations

from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from msgspec import structs

from lightning_bus import messages as m
from lightning_bus.broker.core import BrokerState
from lightning_bus.broker.producers import NO_SPANS
from lightning_bus.lifecycle import Event, Status, next_status
from lightning_bus.log.codec import decode_event
from lightning_bus.records import Kind
from tests.core_harness import LEASE_S, Desk

WORKERS = ["w-0", "w-1", "w-2"]
PRODUCERS = ["g-0", "g-1"]
IDS = [f"r-{i}" for i in range(6)]
MAX_ATTEMPTS = 3
TERMS = {  # what each of them is submitted with
    "r-0": m.Submission("r-0", b"r-0"),
    "r-1": m.Submission("r-1", b"r-1", group="g", priority=1, key="k-1"),
    "r-2": m.Submission("r-2", b"r-2", group="g", delay_s=3.0),
    "r-3": m.Submission("r-3", b"r-3" * 10, lease_s=LEASE_S / 4),
    "r-4": m.Submission("r-4", b"r-4", timeout_s=LEASE_S * 1.5, key="k-4"),
    "r-5": m.Submission("r-5", b"r-5", priority=-2, max_attempts=1, key="k-5", delay_s=0.5),
}

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
        self.batches: dict[str, tuple[int, int]] = {}  # newest (epoch, seq) of each producer in the log
        self.waiting: set[str] = set()  # who waits is to be told of these
        self.replays: dict[str, str] = {}  # dead letter → the id it was replayed as
        self.acked: list[bytes] = []  # blobs whose APPEND was acknowledged and not fenced
        self.ended: dict[str, tuple[str, int]] = {}  # accepted results: rollout → (worker, attempt)
        self.blobs = 0
        self.checked = 0  # records looked at so far
        self.lives: dict[str, tuple[Status | None, int, str]] = {}
        self.counted: Counter[str] = Counter()  # attempts that count
        self.finished: Counter[str] = Counter()

    # -- what the world does

    @rule(ids=st.lists(st.sampled_from(IDS), min_size=1, max_size=3))
    def submit(self, ids: list[str]) -> None:
        self.say("t", m.Submit([TERMS[i] for i in ids]))

    @rule(ids=st.lists(st.sampled_from(IDS), min_size=1, max_size=2), twin=st.sampled_from(["x-1", "x-2"]))
    def submit_again_by_key(self, ids: list[str], twin: str) -> None:
        known = [i for i in dict.fromkeys(ids) if i in self.desk.state.rollouts and TERMS[i].key]
        if known:
            again = [structs.replace(TERMS[i], rollout_id=twin) for i in known]
            assert self.say("t", m.Submit(again)) == m.Accepted(0, known)

    @rule(ids=st.lists(st.sampled_from(IDS), min_size=1, max_size=4))
    def wait(self, ids: list[str]) -> None:
        """Replaces what was waited for before: the number of the request is the same."""
        answer = self.say("c", m.Wait(ids, 60_000))
        if isinstance(answer, m.Ended):
            ended = {end.rollout_id for end in answer.ended}
            assert ended == {i for i in ids if self.desk.state.rollouts[i].status.terminal}
            self.waiting = set(ids) - ended
            assert answer.open == len(self.waiting)

    @rule(which=st.sampled_from(["replay", "purge"]), data=st.data())
    def bury(self, which: str, data: st.DataObject) -> None:
        if not self.desk.state.dead:
            return
        letter = data.draw(st.sampled_from(list(self.desk.state.dead)))
        answer = self.say("t", m.Replay([letter]) if which == "replay" else m.Purge([letter]))
        assert isinstance(answer, m.Accepted)
        assert answer.fresh == 1
        if which == "replay":
            (self.replays[letter],) = answer.rollout_ids
        assert letter not in self.desk.state.dead

    @rule(resume=st.booleans())
    def drain(self, resume: bool) -> None:
        self.desk.say("t", m.Drain(resume))

    @rule(worker=workers, slots=st.integers(0, 3), task_bytes_max=st.sampled_from([0, 0, 10, 100]))
    def heartbeat(self, worker: str, slots: int, task_bytes_max: int) -> None:
        held = [m.Held(task.rollout_id, task.attempt) for task in self.inbox[worker]]
        answer = self.say(worker, m.Heartbeat(slots, held, task_bytes_max))
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
        kind = data.draw(st.sampled_from(["done", "done", "fail", "final", "nack", "release"]))
        attempt = task.rollout_id, task.attempt
        body: m.Body = m.Done(*attempt, 1.0)
        if kind in ("fail", "final"):
            body = m.Fail(*attempt, "boom", retryable=kind == "fail")
        elif kind == "nack":
            body = m.Nack(*attempt, data.draw(st.sampled_from([0.0, 5.0])))
        elif kind == "release":
            body = m.Release(*attempt)
        blobs = [] if kind in ("nack", "release") else [self.blob()]
        answer = self.say(worker, body, blobs, count=len(blobs))
        if isinstance(answer, m.Accepted) and answer.fresh and kind in ("done", "final"):
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

    @rule(producer=producers, ahead=st.integers(1, 3))
    def append_out_of_turn(self, producer: str, ahead: int) -> None:
        """A batch overtook the one before it: it is not kept, and its sender told where to go on."""
        seq = self.seqs[producer]
        body = m.Append([m.Part("", 0, 1)])
        answer = self.desk.say(producer, body, [b"early"], epoch=self.epochs[producer], seq=seq + 1 + ahead)
        assert answer == m.Resync(self.epochs[producer], seq)
        assert not self.desk.last.writes

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
            if isinstance(body, m.Wait) and isinstance(answer, m.Ended):
                self.waiting = set(body.rollout_ids) - {end.rollout_id for end in answer.ended}

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
        self.waiting = set()  # subscriptions are asked for again

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
            if record.kind is Kind.SPANS and record.seq:
                epoch, seq = self.batches.get(record.producer, (record.epoch, 0))
                if record.epoch > epoch:
                    epoch, seq = record.epoch, 0
                assert (record.epoch, record.seq - seq) in ((epoch, 0), (epoch, 1))
                self.batches[record.producer] = record.epoch, record.seq
            elif record.kind is Kind.ROLLOUT:
                self.follow(record.rollout_id, record.attempt, decode_event(record).what, decode_event(record).worker)
        self.checked = len(records)
        assert self.desk.state.next_offset == len(records)

    @invariant()
    def acknowledged_spans_are_in_the_log_once(self) -> None:
        bodies = Counter(r.body for r in self.desk.log.records if r.kind is Kind.SPANS and r.body != NO_SPANS)
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
        assert (restored.line, restored.keys) == (live.line, live.keys)
        assert set(restored.dead) == set(live.dead)
        assert list(restored.finished) == list(live.finished)
        assert restored.next_offset == live.next_offset
        assert +restored.counts == +live.counts
        holders = {i: (lease.worker, lease.attempt) for i, lease in live.table.leases.items()}
        assert {i: (lease.worker, lease.attempt) for i, lease in restored.table.leases.items()} == holders
        queued = {i for i, rollout in live.rollouts.items() if rollout.status is Status.QUEUED}
        assert set(live.delayed) <= queued
        assert ready(restored) | set(restored.delayed) == queued
        assert len(live.ready) + len(live.delayed) + (live.next_up is not None) >= len(queued)

    @invariant()
    def who_waits_is_told(self) -> None:
        """Every end since the last look was told, and nothing twice."""
        pushed, self.desk.pushed = self.desk.pushed, []
        for _, end in pushed:
            assert end.rollout_id in self.waiting
            assert self.desk.state.rollouts[end.rollout_id].status is end.status
            self.waiting.discard(end.rollout_id)
        assert not any(self.desk.state.rollouts[i].status.terminal for i in self.waiting)

    def teardown(self) -> None:
        """However the history went, an honest worker can finish what is left."""
        self.desk.say("t", m.Drain(resume=True))
        for _ in range(MAX_ATTEMPTS * len(self.desk.state.rollouts) + 2):
            self.desk.tick(50.0)
            held = self.desk.held("honest")
            self.desk.beat("honest", len(self.desk.state.rollouts), *held)
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
        if what == "submit":
            assert rollout_id not in self.lives
            assert rollout_id in IDS or rollout_id in self.replays.values()
            self.lives[rollout_id] = Status.QUEUED, 0, ""
            return
        status, attempt_last, _ = self.lives[rollout_id]
        if what in ("replay", "purge"):
            assert (status, attempt) == (Status.FAILED, attempt_last)
            return
        assert status is not None
        assert not status.terminal
        assert attempt == attempt_last + (what == Event.LEASE)
        self.counted[rollout_id] += (what == Event.LEASE) - (what == Event.RELEASE)
        assert self.counted[rollout_id] <= MAX_ATTEMPTS
        status = next_status(status, Event(what))
        self.finished[rollout_id] += status.terminal
        self.lives[rollout_id] = status, attempt, worker


def ready(restored: BrokerState) -> set[str]:
    """Empty the line of a broker that nobody needs."""
    found: set[str] = set()
    while (rollout_id := restored.ready.pop(0.0, lambda _: True)) is not None:
        found.add(rollout_id)
    return found


Histories.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestHistories = Histories.TestCase
