"""Does the log keep the promises? Proved from the log alone, with nothing that any process remembers.

One pass over the records, in order, rebuilds every rollout's life, every producer's batches, every span and every
weight version, and each check collects what contradicts it. A check that found no offender but had nothing to look
at says so with a count of 0; it is for the reader to judge whether the run should have had some.

Where retention has dropped the oldest records, what began in them cannot be proved any more: it is taken as the log
first tells of it, counted as `unproved`, and everything after that is checked as ever.

Not proved: that a model call's tokens are what the engine computed (the engine's tests do that). And in logs from
before a batch whose parts were all fenced left an empty record: that a batch missing from a producer's numbers was
refused rather than lost. Their number is reported.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import msgspec

from lightning_bus.errors import LightningBusError, RemoteProtocolError
from lightning_bus.lifecycle import Event, IllegalMove, Status, next_status
from lightning_bus.log.codec import decode_event, decode_record
from lightning_bus.log.reader import LogReader
from lightning_bus.records import Kind, Record
from lightning_bus.resources import POLICY, Resource, WeightVersion, decode, policy_of
from lightning_bus.spans import REQUEST_MODEL, decode_spans, is_model_call, model_call

OFFENDERS_SHOWN = 5
ASIDE = frozenset({"replay", "purge"})  # done to a dead letter, which stays one
REPEATING_PHASES = frozenset({"sft"})  # epochs over the same recorded calls; everything else trains on a call once


class Reader(Protocol):
    """What verify asks of a log."""

    @property
    def first_offset(self) -> int: ...

    @property
    def end_offset(self) -> int: ...

    def values(self) -> Iterator[bytes]: ...


@dataclass(slots=True)
class Check:
    """One promise: how many things were looked at, and what contradicts it."""

    promise: str
    unit: str
    looked_at: int = 0
    offenders: int = 0
    first: list[str] = field(default_factory=list[str])
    note: str = ""
    unproved: int = 0  # things that cannot be looked at, because what they rest on was dropped

    @property
    def proved(self) -> bool:
        return self.offenders == 0

    def offend(self, what: str) -> None:
        self.offenders += 1
        if len(self.first) < OFFENDERS_SHOWN:
            self.first.append(what)


@dataclass(slots=True)
class Report:
    """Every check of a log."""

    log: str
    checks: list[Check]
    first_offset: int = 0  # where the log begins; what was before that has been dropped

    @property
    def proved(self) -> bool:
        return all(check.proved for check in self.checks)

    def to_builtins(self) -> dict[str, Any]:
        """Return the report as plain values, for JSON."""
        checks = [{**msgspec.to_builtins(check), "proved": check.proved} for check in self.checks]
        return {"log": self.log, "proved": self.proved, "first_offset": self.first_offset, "checks": checks}


def verify(run_dir: Path) -> Report:
    """Return what the log of a run proves. Raises CallError when there is no log."""
    path = run_dir / "log"
    with LogReader(path) as reader:
        return verify_log(reader, str(path))


def verify_log(reader: Reader, name: str = "log") -> Report:
    """Return what the records of this log prove."""
    evidence = Evidence(reader.first_offset)
    for record in evidence.whole_records(reader):
        evidence.take(record)
    return Report(name, evidence.conclude(), evidence.first_offset)


@dataclass(slots=True)
class Life:
    """A rollout as its events tell it."""

    status: Status | None = None
    attempt: int = 0
    submits: int = 0
    ends: int = 0
    began_before: bool = False  # its submission was dropped with the records before the log's first


class Evidence:
    """What one pass over the log collects. Feed records in order with `take`, then `conclude`."""

    def __init__(self, first_offset: int = 0) -> None:
        self.first_offset = first_offset
        self.whole = Check("every record is whole and follows its predecessor", "records")
        self.once = Check("every submitted rollout ended exactly once, and terminal was final", "rollouts")
        self.attempts = Check("attempts were numbered 1, 2, … and each move was legal", "moves")
        self.batches = Check("no batch was appended twice or out of order", "batches")
        self.spans_once = Check("no span was appended twice", "spans")
        self.unfenced = Check("spans were only kept from the attempt that held the lease", "span records")
        self.versions = Check("weight versions rise, each from a published parent", "versions")
        self.trained = Check("every call trained on is in the log, trainable, from the attempt that succeeded", "calls")
        self.trained_once = Check("no call was trained on twice (SFT epochs excepted)", "calls")
        self.served = Check("every update's weights were used by a later model call", "updates")
        self._lives: dict[str, Life] = defaultdict(Life)
        self._spans: dict[str, dict[bytes, int]] = defaultdict(dict)  # rollout → span → attempt
        self._calls: dict[tuple[str, int, bytes], str] = {}  # model calls → why untrainable, or ""
        self._batch_last: dict[str, tuple[int, int, int]] = {}  # producer → (epoch, seq, part)
        self._parts_of_ends: set[tuple[str, int, str, int, int]] = set()
        self._batches_missing = 0
        self._gaps: list[str] = []
        self._fenced_leave_records = False  # a batch of which nothing was kept left an empty record
        self._versions: dict[str, dict[int, tuple[int, WeightVersion]]] = {}  # policy → version → (offset, record)
        self._trained_by: dict[tuple[str, int, bytes], WeightVersion] = {}
        self._used_at: dict[tuple[str, str], int] = {}  # (model, weight version) → newest offset of a call of it

    def whole_records(self, reader: Reader) -> Iterator[Record]:
        """Yield the records that can be read; note those that cannot, and gaps."""
        check = self.whole
        expected = self.first_offset
        end_offset = reader.end_offset  # asked first: a log that is being written may grow while it is read
        for value in reader.values():
            check.looked_at += 1
            try:
                record = decode_record(value)
            except RemoteProtocolError as exc:
                check.offend(str(exc))
                expected += 1
                continue
            if record.offset != expected:
                check.offend(f"record {record.offset} stands where {expected} should")
            expected = record.offset + 1
            yield record
        if expected < end_offset:
            check.offend(f"the log ends at {end_offset}, its records at {expected}")

    def take(self, record: Record) -> None:
        """Learn what a record says. One whose body cannot be read is not whole."""
        try:
            if record.kind is Kind.ROLLOUT:
                self._take_event(record)
            elif record.kind is Kind.SPANS:
                self._take_batch(record)
                self._take_spans(record)
            else:
                self._take_resource(record)
        except (LightningBusError, msgspec.DecodeError) as exc:
            self.whole.offend(f"record {record.offset}: {exc}")

    def conclude(self) -> list[Check]:
        """Return all checks, those that need the whole log included."""
        for rollout_id, life in self._lives.items():
            self.once.looked_at += 1
            if life.began_before:
                self.once.unproved += 1
            if life.submits != 1 and not (life.began_before and life.submits == 0):
                self.once.offend(f"{rollout_id} was submitted {life.submits} times")
            if life.ends != 1:
                stands = life.status.value if life.status else "unknown"
                self.once.offend(f"{rollout_id} ended {life.ends} times; it is {stands} at attempt {life.attempt}")
        for policy in sorted(self._versions):
            self._conclude_versions(policy)
        if self._fenced_leave_records:
            for gap in self._gaps:
                self.batches.offend(gap)
        elif self._batches_missing:
            self.batches.note = f"{self._batches_missing} numbers left no record: batches that were fenced, or lost"
        checks = [
            self.whole, self.once, self.attempts, self.batches, self.spans_once, self.unfenced,
            self.versions, self.trained, self.trained_once, self.served,
        ]  # fmt: skip
        for check in checks:
            if check.unproved:
                dropped = (
                    f"{check.unproved} {check.unit} rest on records before {self.first_offset}, which were dropped"
                )
                check.note = f"{check.note}; {dropped}" if check.note else dropped
        return checks

    def _conclude_versions(self, policy: str) -> None:
        """Check of one policy that its updates were used, and what they were trained on."""
        known = self._versions[policy]
        going_on = _ancestors_of_newest(known)
        for version, (offset, weights) in sorted(known.items()):
            if not weights.trained:
                continue
            self.served.looked_at += 1
            used = self._used_after(policy, version, offset)
            if not used and version not in going_on:
                self.served.note = f"{_named(policy, version)} was rolled back before it was used"
            elif not used:
                self.served.offend(
                    f"{_named(policy, version)} ({weights.phase} step {weights.step}): no call after record {offset} used it"
                )
            for rollout in weights.trained:
                life = self._lives.get(rollout.rollout_id)
                if life is None and self.first_offset > 0:
                    continue  # counted as unproved, call by call
                if life is None or life.status is not Status.SUCCEEDED or life.attempt != rollout.attempt:
                    stands = f"{life.status.value} at attempt {life.attempt}" if life and life.status else "unknown"
                    self.trained.offend(
                        f"{_named(policy, version)} trained on {rollout.rollout_id} attempt {rollout.attempt}, which is {stands}"
                    )

    def _used_after(self, policy: str, version: int, offset: int) -> bool:
        """True when a later call was answered by this version of this policy. Agents may call the only policy anything."""
        return any(
            at > offset
            for (model, used), at in self._used_at.items()
            if used == str(version) and (model == policy or (policy == POLICY and model not in self._versions))
        )

    def _take_event(self, record: Record) -> None:
        event = decode_event(record)
        life = self._lives[record.rollout_id]
        here = f"{record.rollout_id}: {event.what} at record {record.offset}"
        self.attempts.looked_at += 1
        if event.what == "submit":
            life.submits += 1
            if life.submits == 1 and life.status is None:
                life.status = Status.QUEUED
            return
        if life.status is None and self.first_offset > 0:
            # Its beginning was dropped: take it as it stands after this event, and go on from there.
            life.began_before = True
            self.attempts.unproved += 1
            life.status = Status(event.status) if event.status in list(Status) else None
            life.attempt = record.attempt
            life.ends += life.status is not None and life.status.terminal  # with this event, or before the first record
            return
        try:
            status = _status_after(life.status, event.what)
        except ValueError as exc:  # an unknown event, or a move that is not in the table
            self.attempts.offend(f"{here}: {exc}")
            # Go on from where the log says the rollout stands, or one bad event would hide the next.
            status = Status(event.status) if event.status in list(Status) else life.status
        if status is not None and event.status != status.value:
            self.attempts.offend(f"{here}: leads to {status.value}, the log says {event.status}")
        due = life.attempt + 1 if event.what == Event.LEASE else life.attempt
        if record.attempt != due:
            self.attempts.offend(f"{here}: attempt {record.attempt} where {due} is due")
        life.status = status
        life.attempt = record.attempt
        if status is not None and status.terminal and event.what not in ASIDE:
            life.ends += 1

    def _take_batch(self, record: Record) -> None:
        here = f"{record.producer} batch {record.epoch}:{record.seq} part {record.part} (record {record.offset})"
        self.batches.looked_at += 1
        if record.seq == 0:
            # Spans that rode with the end of an attempt: named by the attempt, of which there is one.
            end = (record.producer, record.epoch, record.rollout_id, record.attempt, record.part)
            if end in self._parts_of_ends:
                self.batches.offend(f"{here} ended {record.rollout_id} attempt {record.attempt} before")
            self._parts_of_ends.add(end)
            return
        now = (record.epoch, record.seq, record.part)
        last = self._batch_last.get(record.producer, (record.epoch, 0, -1))
        if now <= last:
            self.batches.offend(f"{here} comes after {last[0]}:{last[1]} part {last[2]}")
            return
        if record.span_count == 0:
            self._fenced_leave_records = True
        seq_last = last[1] if record.epoch == last[0] else 0
        if record.producer not in self._batch_last and self.first_offset > 0:
            self.batches.unproved += 1  # what it sent before was dropped
        elif record.seq > seq_last + 1:
            self._batches_missing += record.seq - seq_last - 1
            self._gaps.append(f"{here} comes after {record.epoch}:{seq_last}: what was between left no record")
        self._batch_last[record.producer] = now

    def _take_spans(self, record: Record) -> None:
        spans = decode_spans(record.body)
        if len(spans) != record.span_count:
            self.whole.offend(f"record {record.offset} says {record.span_count} spans and holds {len(spans)}")
        if record.rollout_id:
            self.unfenced.looked_at += 1
            life = self._lives[record.rollout_id]
            if life.status is None and self.first_offset > 0:
                life.began_before, life.status, life.attempt = True, Status.LEASED, record.attempt
                self.unfenced.unproved += 1
            if life.status is not Status.LEASED or life.attempt != record.attempt:
                stands = f"{life.status.value} at attempt {life.attempt}" if life.status else "unknown"
                self.unfenced.offend(
                    f"record {record.offset} is of {record.rollout_id} attempt {record.attempt}, which was {stands}"
                )
        known = self._spans[record.rollout_id]
        for span in spans:
            self.spans_once.looked_at += 1
            if span.span_id in known:
                self.spans_once.offend(
                    f"span {span.span_id.hex()} of rollout {record.rollout_id!r} again at record {record.offset}"
                )
            known[span.span_id] = record.attempt
            if is_model_call(span):
                call = model_call(span)
                self._calls[record.rollout_id, record.attempt, span.span_id] = call.untrainable
                for version, _, _ in call.weight_versions:
                    self._used_at[str(span.attributes.get(REQUEST_MODEL, "")), version] = record.offset

    def _take_resource(self, record: Record) -> None:
        resource = msgspec.msgpack.decode(record.body, type=Resource)
        policy = policy_of(resource.name)
        if policy is None:
            return
        known = self._versions.setdefault(policy, {})
        weights = decode(resource, WeightVersion)
        version = resource.version
        self.versions.looked_at += 1
        if weights.version != version:
            self.versions.offend(f"{_named(policy, version)} calls itself {weights.version}")
        if known and version <= max(known):
            self.versions.offend(f"{_named(policy, version)} was published after version {max(known)}")
        oldest = min(known, default=version)
        if self.first_offset > 0 and weights.parent is not None and weights.parent < oldest:
            self.versions.unproved += 1
        elif weights.parent is not None and (weights.parent not in known or weights.parent >= version):
            self.versions.offend(f"{_named(policy, version)} has the unpublished parent {weights.parent}")
        known[version] = (record.offset, weights)
        for rollout in weights.trained:
            for span_id in rollout.span_ids:
                self._take_trained(weights, (rollout.rollout_id, rollout.attempt, span_id))

    def _take_trained(self, weights: WeightVersion, call: tuple[str, int, bytes]) -> None:
        rollout_id, attempt, span_id = call
        here = f"version {weights.version} trained on {rollout_id} attempt {attempt} span {span_id.hex()}"
        self.trained.looked_at += 1
        self.trained_once.looked_at += 1
        if call not in self._calls:
            found = self._spans.get(rollout_id, {}).get(span_id)
            life = self._lives.get(rollout_id)
            if found is None and self.first_offset > 0 and (life is None or life.began_before):
                self.trained.unproved += 1
            elif found is None:
                self.trained.offend(f"{here}, which is not in the log before it")
            elif found != attempt:
                self.trained.offend(f"{here}, which belongs to attempt {found}")
            else:
                self.trained.offend(f"{here}, which is not a model call")
        elif self._calls[call]:
            self.trained.offend(f"{here}, which is untrainable: {self._calls[call]}")
        before = self._trained_by.get(call)
        if before is not None and (before is weights or {before.phase, weights.phase} - REPEATING_PHASES):
            self.trained_once.offend(f"{here}; version {before.version} did already")
        self._trained_by[call] = weights


def _named(policy: str, version: int) -> str:
    return f"version {version}" if policy == POLICY else f"version {version} of {policy}"


def _ancestors_of_newest(known: Mapping[int, tuple[int, WeightVersion]]) -> set[int]:
    """The newest version and those that it came from: what a rollback gave up may never have been called."""
    found: set[int] = set()
    version = max(known, default=None)
    while version is not None and version in known and version not in found:
        found.add(version)
        version = known[version][1].parent
    return found


def _status_after(status: Status | None, what: str) -> Status:
    """Return where an event leads. Raises ValueError when it is unknown, or cannot happen in that status."""
    if status is None:
        raise IllegalMove(f"a rollout that was never submitted cannot {what}")
    if what in ASIDE:
        if status is not Status.FAILED:
            raise IllegalMove(f"a rollout that is {status.value} is no dead letter: it cannot {what}")
        return status
    return next_status(status, Event(what))
