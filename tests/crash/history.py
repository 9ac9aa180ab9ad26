"""What clients were told, compared with what the log holds.

Watched: everything acknowledged is in the log; no span is there twice; each writer's spans are in its order, without a
hole; each rollout was ended exactly once, by the attempt that was told so; what was read is what the log still holds;
a cursor never went back; and `verify` proves the log. Not watched: how long anything took.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

import anyio

from lightning_bus import Status, decode_spans
from lightning_bus.log.codec import encode_record
from lightning_bus.log.reader import LogReader
from lightning_bus.log.verify import verify_log
from lightning_bus.records import Kind
from tests.crash.callers import Event, digest

SPANS_ONCE = "no span was appended twice"  # of verify's claims; our own spans are counted by name


class History:
    """What the clients of one broker were told. `on_event` is theirs to call."""

    def __init__(self) -> None:
        self.acks_of: Counter[str] = Counter()  # caller → acknowledgements, of whatever kind
        self.appended: dict[str, list[int]] = defaultdict(list)  # writer → numbers, in the order acknowledged
        self.submitted: list[str] = []
        self.done: dict[str, int] = {}  # rollout → the attempt whose DONE was accepted
        self.fenced: list[tuple[str, int]] = []
        self.in_attempt: set[str] = set()  # names of spans acknowledged within an attempt
        self.read: dict[str, list[tuple[int, int, str]]] = defaultdict(list)  # reader → from, to, digest
        self.cursors: dict[str, int] = {}
        self.held: dict[str, int] = {}  # rollout → the attempt that somebody sits on
        self.late: list[tuple[str, str, int, str]] = []
        self._progress = anyio.Event()

    @property
    def acks(self) -> int:
        return self.acks_of.total()

    def on_event(self, caller: str, event: Event) -> None:
        match event:
            case ["append", str(writer), int(number)]:
                self.appended[writer].append(number)
            case ["submit", list(ids)]:
                self.submitted.extend(ids)
            case ["step" | "last", str(), int(), str(name)]:
                self.in_attempt.add(name)
            case ["done", str(rollout_id), int(attempt)]:
                assert rollout_id not in self.done, f"two attempts were told that they ended {rollout_id}"
                self.done[rollout_id] = attempt
            case ["fenced", str(rollout_id), int(attempt)]:
                self.fenced.append((rollout_id, attempt))
            case ["hold", str(rollout_id), int(attempt)]:
                self.held[rollout_id] = attempt
            case ["late", str(what), str(rollout_id), int(attempt), str(became)]:
                self.late.append((what, rollout_id, attempt, became))
            case ["read", int(offset), int(next_offset), str(seen)]:
                assert offset == (self.read[caller][-1][1] if self.read[caller] else 0)
                self.read[caller].append((offset, next_offset, seen))
                return
            case ["cursor", int(offset)]:
                assert offset >= self.cursors.get(caller, 0), f"the cursor of {caller} went back"
                self.cursors[caller] = offset
            case _:
                raise AssertionError(f"{caller} said {event}")
        self.acks_of[caller] += 1
        self._progress.set()

    async def wait_until(self, condition: Callable[[], bool]) -> None:
        """Return when what was heard makes the condition true."""
        while not condition():
            self._progress = anyio.Event()
            await self._progress.wait()

    async def wait_more_acks(self, count: int, *callers: str) -> None:
        """Return after so many more acknowledgements, of these callers or of all."""

        def heard() -> int:
            return sum(self.acks_of[caller] for caller in callers) if callers else self.acks

        until = heard() + count
        await self.wait_until(lambda: heard() >= until)

    def check(self, log_dir: Path, *, strangers: tuple[str, ...] = ()) -> None:
        """Compare with the log of a broker that has ended, and whose clients have finished.

        What producers whose names begin with one of `strangers` put there may be anything, and any span twice.
        """
        with LogReader(log_dir) as reader:
            records = list(reader.records())
            rollouts = {rollout.submission.rollout_id: rollout for rollout in reader.rollouts()}
            report = verify_log(reader)
        unproved = [c for c in report.checks if not c.proved and not (strangers and c.promise == SPANS_ONCE)]
        assert not unproved, unproved
        assert [record.offset for record in records] == list(range(len(records)))

        names = [
            s.name
            for r in records
            if r.kind is Kind.SPANS and not r.producer.startswith(strangers)
            for s in decode_spans(r.body)
        ]
        twice = [name for name, count in Counter(names).items() if count > 1]
        assert not twice, f"{len(twice)} spans were kept twice, for example {twice[:3]}"
        assert self.in_attempt <= set(names), "spans of attempts were acknowledged and lost"
        self._check_writers(names)

        assert set(rollouts) >= set(self.submitted)
        assert set(self.done) <= set(rollouts)
        for rollout_id in self.submitted:
            rollout = rollouts[rollout_id]
            assert rollout.status is Status.SUCCEEDED, f"{rollout_id} is {rollout.status}"
            assert self.done[rollout_id] == rollout.attempt
        blobs = [encode_record(record) for record in records]
        for reader_name, read in self.read.items():
            for offset, next_offset, seen in read:
                assert seen == digest(blobs[offset:next_offset]), f"{reader_name} read what is not in the log"

    def _check_writers(self, names: list[str]) -> None:
        kept: dict[str, list[int]] = defaultdict(list)
        for name in names:
            writer, _, number = name.partition(" ")
            if writer in self.appended:
                kept[writer].append(int(number))
        for writer, acked in self.appended.items():
            assert acked == list(range(len(acked)))
            assert kept[writer] == list(range(len(kept[writer]))), f"the spans of {writer} are out of order"
            assert len(kept[writer]) >= len(acked)
