"""The promises, watched: what is on disk by the ledger, and here what was told and what the broker's memory holds.

    on disk     `ledger`: each transaction continues every life legally
    told        an answer tells only what is on disk, and what is on disk never contradicts an answer
    in time     with the harm over, who waits is told within PROMPT_S, and nothing goes on for longer than it may
    in memory   a broker knows what its log tells, and remembers nobody who is gone

A check that fails raises Violation, whose text begins with the promise. Not watched: turns between groups of one
priority (tests/properties), when retention drops what it may, what STATUS counts as requeued, fenced and refused, and
how much the broker's answers weigh.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from lightning_bus import messages as m
from lightning_bus.errors import LightningBusError
from lightning_bus.records import Record
from lightning_bus.resources import Resource
from tests.simulation.ledger import TERMINAL, Ledger, Report, Violation, check

PROMPT_S = 2.0  # between what happens and who waits for it, in calm: one resend, and then some

__all__ = ["Oracle", "Violation", "is_session_over"]


class Oracle:
    """One history, checked while it happens. Times are the loop's, of which every process has the same."""

    def __init__(self, max_attempts: int, lease_s: float, now_s: Callable[[], float]) -> None:
        self.disk = Ledger(max_attempts, lease_s)
        self._now_s = now_s
        self._cursor_told: dict[str, int] = {}
        self._drains: list[tuple[float, float, float]] = []  # asked, told, lasted until

    # -- what was told: work

    def sent_task(self, worker: str, task: m.Task) -> None:
        """A TASK left the broker."""
        life = self.disk.life(task.rollout_id)
        holder = None if life is None else life.holders.get(task.attempt)
        check(holder == worker, "an attempt is on disk before it is sent, and has one holder",
              task.rollout_id, task.attempt, "sent to", worker, "held by", holder)  # fmt: skip

    def appending(self, session: str, chunk: bytes) -> None:
        """A client was asked to append; its chunks are in the order of these calls."""
        self.disk.issued[chunk] = session, len(self.disk.issued)

    def appended(self, chunk: bytes) -> None:
        check(chunk in self.disk.spans, "an acknowledged span is on disk", self.disk.issued[chunk])

    def not_kept(self, chunk: bytes) -> None:
        """A client was told that its spans were fenced."""
        if chunk:
            issued, reported = self.disk.issued.get(chunk), self.disk.reported.get(chunk)
            check(chunk not in self.disk.spans, "fenced means not recorded", issued, reported)
            self.disk.refused.add(chunk)

    def report_fenced(self, task: m.Task, what: str, chunk: bytes) -> None:
        """A worker was told that what it said came too late.

        Of handing back the broker remembers the two newest attempts: an older one may be told so although it counted.
        """
        life = self.disk.life(task.rollout_id)
        if what == "done" or (life is not None and life.attempt < task.attempt + 2):
            self.not_kept(chunk)

    def reporting(self, session: str, task: m.Task, what: str, chunk: bytes, delay_s: float) -> None:
        """A worker is about to say what came of an attempt; `chunk` are its last spans."""
        attempt = task.rollout_id, task.attempt
        if chunk:
            self.disk.reported[chunk] = attempt
        self.disk.reports.setdefault(attempt, []).append(Report(session, what, delay_s))

    def reported(self, session: str, task: m.Task, what: str, chunk: bytes) -> None:
        """The broker has accepted that."""
        life = self.disk.life(task.rollout_id)
        here = task.rollout_id, task.attempt, what
        if life is None:
            raise Violation(f"an acknowledged result is on disk: {here}")
        check(not chunk or chunk in self.disk.spans, "an acknowledged result is on disk", *here)
        check(life.holders[task.attempt] == session, "only the holder reports", *here, session)
        ends = {"done": {"succeeded"}, "final": {"failed"}, "release": {"queued"}}.get(what, {"queued", "failed"})
        stands = any((end, task.attempt) in life.been for end in ends)
        check(stands, "an acknowledged result stands", *here, life)

    # -- what was told: rollouts

    def submitted(self, submission: m.Submission, rollout_id: str) -> None:
        """A SUBMIT was accepted, under that id."""
        life = self.disk.life(rollout_id)
        if life is None or life.submission is None:
            raise Violation(f"an acknowledged rollout is on disk: {rollout_id}")
        if submission.key:
            check(life.submission.key == submission.key, "one rollout an idempotency key", submission, life.submission)
        else:
            check(submission.rollout_id == rollout_id, "a rollout keeps its id", submission.rollout_id, rollout_id)
        check(life.submission.task == submission.task, "a known id has its task", rollout_id)

    def cancelled(self, rollout_ids: Sequence[str]) -> None:
        for rollout_id in rollout_ids:
            life = self.disk.life(rollout_id)
            check(life is not None and life.status in TERMINAL, "cancelled is over", rollout_id, life)

    def told_end(self, end: m.End, asked_s: float | None) -> None:
        """A WAIT was answered, or pushed. `asked_s`: it was asked then, in calm, so this should have come at once."""
        life = self.disk.life(end.rollout_id)
        if life is None:
            raise Violation(f"only what is on disk is told: {end}")
        stands = life.status, life.attempt, life.reward
        check(stands == (str(end.status), end.attempt, end.reward) and life.status in TERMINAL,
              "only what is on disk is told", end, life)  # fmt: skip
        if asked_s is not None and asked_s > self._broker_s:
            late_s = self._now_s() - max(asked_s, life.ended_s)
            check(late_s <= PROMPT_S, "who waits is told at once", end.rollout_id, f"{late_s:.3f} s")

    def dead_letters(self, letters: Sequence[m.Rollout]) -> None:
        for letter in letters:
            life = self.disk.life(letter.submission.rollout_id)
            check(
                life is not None and life.status == "failed" and life.submission is not None
                and life.submission.task == letter.submission.task,
                "a dead letter keeps its task", letter, life,
            )  # fmt: skip

    def replayed(self, letter_id: str, replay_id: str) -> None:
        life = self.disk.life(letter_id)
        check(
            life is not None and life.replayed_as == replay_id, "one replay a dead letter", letter_id, replay_id, life
        )
        check(self.disk.life(replay_id) is not None, "an acknowledged rollout is on disk", replay_id)

    def purged(self, letter_id: str) -> None:
        life = self.disk.life(letter_id)
        check(life is not None and life.purged, "an acknowledged purge is on disk", letter_id, life)

    def drained(self, asked_s: float, told_s: float, until_s: float) -> None:
        """A broker was asked to drain, said so, and nobody has told it to go on until then."""
        self._drains.append((asked_s, told_s, until_s))

    def seen(self, rollouts: Sequence[m.Rollout]) -> None:
        """A QUERY was answered."""
        for rollout in rollouts:
            life = self.disk.life(rollout.submission.rollout_id)
            stands = (str(rollout.status), rollout.attempt)
            check(life is not None and stands in life.been, "only what is on disk is told", stands, life)

    def counted(self, status: m.StatusIs) -> None:
        known = len(self.disk.lives) + len(self.disk.forgotten)
        check(sum(status.rollouts.values()) <= known, "counts add up", status)
        check(all(count >= 0 for count in status.rollouts.values()), "counts add up", status)
        check(status.held == status.rollouts["leased"], "counts add up", status)
        check(0 <= status.delayed <= status.rollouts["queued"], "counts add up", status)
        check(0 <= status.dead <= status.rollouts["failed"], "counts add up", status)
        check(status.next_offset <= self.disk.end_offset, "only what is on disk is told", status)

    # -- what was told: resources and the log

    def published(self, resource: Resource) -> None:
        check(resource in self.disk.resources.values(), "an acknowledged resource is on disk", resource)

    def watched(self, resource: Resource, above: int, asked_s: float | None) -> None:
        """A WATCH was answered. `asked_s` as in `told_end`."""
        self.published(resource)
        check(resource.version > above, "a watcher sees newer versions", resource, above)
        if asked_s is not None and asked_s > self._broker_s:
            late_s = self._now_s() - max(asked_s, self.disk.published_s[resource.name, resource.version])
            check(late_s <= PROMPT_S, "who watches is told at once", resource, f"{late_s:.3f} s")

    def moving_cursor(self, name: str, offset: int) -> None:
        self.disk.cursor_asked.setdefault(name, set()).add(offset)

    def cursor_at(self, name: str, offset: int) -> None:
        """A consumer, of which there is one a name, was told where its cursor is."""
        check(offset <= self.disk.cursors.get(name, 0), "an acknowledged cursor is on disk", name, offset)
        check(offset >= self._cursor_told.get(name, 0), "a cursor never goes back", name, offset)
        self._cursor_told[name] = offset

    def fetched(self, offset: int, records: Sequence[Record], next_offset: int, end_offset: int) -> None:
        """A reader asked for `offset` and got these."""
        due = list(range(offset, offset + len(records)))
        check([record.offset for record in records] == due, "a reader never skips", offset, len(records))
        check(next_offset == offset + len(records), "a reader never skips", offset, next_offset)
        check(end_offset <= self.disk.end_offset and next_offset <= max(offset, end_offset),
              "only what is on disk is told", next_offset, end_offset)  # fmt: skip

    def dropping(self, first_offset: int) -> None:
        """Retention drops what is before that."""
        at = min(self.disk.cursors.values(), default=first_offset)
        check(first_offset <= at, "retention keeps what a cursor has to read", first_offset, self.disk.cursors)
        check(first_offset <= self.disk.end_offset, "retention drops whole segments", first_offset)
        self.disk.first_offset = first_offset

    @property
    def _broker_s(self) -> float:
        """When the newest broker started. Who asked the one before may have to ask again."""
        return max(self.disk.brokers_s.values(), default=0.0)

    # -- in time

    def on_time(self, since_s: float) -> None:
        """In calm, since then: no attempt takes longer than its time limit, which a broker that starts counts anew."""
        since_s = max(since_s, self._broker_s)
        for rollout_id in self.disk.unfinished:
            life = self.disk.lives[rollout_id]
            if life.status == "leased" and life.submission is not None and life.submission.timeout_s:
                took_s = self._now_s() - max(since_s, life.moved_s)
                over = took_s > life.submission.timeout_s + PROMPT_S
                check(not over, "a time limit ends an attempt", rollout_id, life.attempt, f"{took_s:.3f} s")

    def conclude(self) -> None:
        """The history is over: what can only be judged now."""
        started_s = self.disk.brokers_s
        for asked_s, told_s, until_s in self._drains:
            for rollout_id, broker, at_s in self.disk.leases:
                drained = told_s < at_s < until_s and started_s[broker] < asked_s
                check(not drained, "a draining broker leases nothing", rollout_id, f"at {at_s:.3f}", told_s, until_s)

    # -- in memory

    def restored(self, state: Any) -> None:
        """A broker opened the log: it must know what the ledger knows."""
        disk = self.disk
        stands = {i: (str(rollout.status), rollout.attempt) for i, rollout in state.rollouts.items()}
        told = {i: (life.status, life.attempt) for i, life in disk.lives.items()}
        check(stands == told, "a broker knows what its log tells", stands, told)
        for name in ("producers", "cursors", "keys"):
            mine, its = getattr(disk, "marks" if name == "producers" else name), getattr(state, name)
            check(its == mine, "a broker knows what its log tells", name, its, mine)
        check(state.next_offset == disk.end_offset, "a broker knows what its log tells", state.next_offset)
        versions = [resource for by_version in state.resources.values() for resource in by_version.values()]
        check(len(versions) == len(disk.resources), "a broker knows what its log tells", versions)
        for producer, (epoch, seq, _) in disk.batch_last.items():
            mark = state.producers[producer]
            check((mark.epoch, mark.seq) >= (epoch, seq), "the dedup mark is as new as the log", producer, mark, seq)
        self.consistent(state)

    def consistent(self, state: Any) -> None:
        """What holds between any two decisions."""
        rollouts, leases = state.rollouts, state.table.leases
        counts = Counter(rollout.status for rollout in rollouts.values())
        check(counts == +state.counts, "counts add up", counts, state.counts)
        check(len(leases) == counts["leased"], "one lease a leased rollout", leases)
        for rollout_id, lease in leases.items():
            rollout = rollouts[rollout_id]
            holder = lease.attempt, lease.worker
            holds = rollout.status == "leased" and (rollout.attempt, rollout.worker) == holder
            check(holds, "one lease a leased rollout", lease, rollout)
        held = sum(map(len, state.table.held_by.values()))
        check(held == len(leases), "one lease a leased rollout", state.table.held_by)
        for rollout_id in state.delayed:
            rollout = rollouts[rollout_id]
            waits = rollout.status == "queued" and rollout.ready_wall_ns > 0
            check(waits, "delayed is what waits for its time", rollout)

    def same(self, live: Any, restored: Any) -> None:
        """With nothing under way, a broker that opened the log now would know what this one knows."""
        for name in ("rollouts", "producers", "cursors", "resources", "next_offset", "keys", "dead"):
            mine, its = getattr(live, name), getattr(restored, name)
            check(mine == its, "memory and disk agree", name, mine, its)
        holders = [{i: (x.worker, x.attempt) for i, x in s.table.leases.items()} for s in (live, restored)]
        check(holders[0] == holders[1], "memory and disk agree", "leases", *holders)
        queued = [i for i, rollout in live.rollouts.items() if rollout.status == "queued"]
        for state in (live, restored):
            waits = len(state.ready) + len(state.delayed) + (state.next_up is not None)
            check(waits >= len(queued), "what is queued will be leased", queued)

    def quiet(self, state: Any, delayed: int) -> None:
        """Everybody has been gone for a while: the broker remembers what is on disk and no more."""
        table = state.table
        left = {
            "waits": len(state.waits), "watches": len(state.watches), "workers": table.workers, "leases": table.leases,
            "open": table.open, "held": table.held_by, "bytes": table.held_bytes, "delayed": len(state.delayed) - delayed,
        }  # fmt: skip
        check(not any(left.values()), "nobody who is gone is remembered", left)


def is_session_over(error: LightningBusError) -> bool:
    """True when a producer was told that a successor took its name: its last batch may well be recorded."""
    return "session is over" in str(error)
