"""A broker's log at work: the real core decides, the real LogWriter commits, and a mark follows each commit.

    python -m tests.crash.power_loss.workload DIRECTORY SEED COMMITS [--no-metasync] [--no-names]

The log is DIRECTORY/log, the marks go to DIRECTORY/acks: one when the log is open for the first time, then one each time
that `commit` has returned. What always holds: the same seed is the same conversation, transaction by transaction, so
whoever knows the seed knows what the log must hold after each.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from random import Random

import lmdb

from lightning_bus import messages as m
from lightning_bus.broker import core
from lightning_bus.log import layout
from lightning_bus.log.store import LogWriter
from lightning_bus.records import Write
from lightning_bus.resources import Resource
from tests.core_harness import Desk, MemoryLog

MAP_BYTES_MAX = 1 << 30
SEGMENT_BYTES = 200_000  # so that the log goes on in a new segment every few transactions
COMMITS_PER_LIFE = 40  # then the log is closed and opened again, as by a broker that restarts
COMMITS_PER_DROP = 7  # then the oldest segments are dropped, but for what
COMMITS_KEPT = 20  # transactions wrote last
BODY_BYTES = (60, 700, 5_000, 40_000)  # within a page, and over one, several and many
PRODUCERS = ("p-0", "p-1", "p-2")
WORKERS = ("w-0", "w-1")


def main() -> None:
    directory, seed, commits = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    if "--no-metasync" in sys.argv:
        lmdb.open = partial(lmdb.open, metasync=False)  # pyright: ignore[reportAttributeAccessIssue]
    if "--no-names" in sys.argv:
        layout.sync = lambda path: None
    acks = os.open(directory / "acks", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    log = open_log(directory)
    os.write(acks, b"open\n")
    ends = [0]
    for number, writes in enumerate(transactions(seed, commits), start=1):
        log.commit(writes)
        os.write(acks, f"{number}\n".encode())
        ends.append(log.end_offset)
        if number % COMMITS_PER_LIFE == 0:
            log.close()
            log = open_log(directory)
        if number % COMMITS_PER_DROP == 0:
            log.drop_before(ends[max(0, number - COMMITS_KEPT)])
    log.close()


def open_log(directory: Path) -> LogWriter:
    return LogWriter(directory / "log", map_bytes_max=MAP_BYTES_MAX, segment_bytes=SEGMENT_BYTES)


def transactions(seed: int, count: int) -> Iterator[list[Write]]:
    """Yield what each of the first `count` transactions writes: what one to four messages brought about."""
    conversation = Conversation(seed)
    while count > 0:
        for _ in range(conversation.dice.randint(1, 4)):
            conversation.go_on()
        if writes := conversation.log.take():
            yield writes
            count -= 1


class GroupedLog(MemoryLog):
    """Also keeps what is decided until it is taken, as the broker's committer does."""

    def __init__(self) -> None:
        super().__init__()
        self._group: list[Write] = []

    def commit(self, effects: core.Effects) -> None:
        super().commit(effects)
        self._group += effects.writes

    def take(self) -> list[Write]:
        group, self._group = self._group, []
        return group


class Conversation:
    """Clients and workers that say whatever the dice tell them to."""

    def __init__(self, seed: int) -> None:
        self.dice = Random(seed)
        self.log = GroupedLog()
        self._desk = Desk()
        self._desk.log = self.log
        self._seqs = dict.fromkeys(PRODUCERS, 0)
        for producer in PRODUCERS:
            self._desk.hello(producer)
        self._submitted = self._published = self._cursor = 0

    def go_on(self) -> None:
        says = [self._submit, self._beat, self._append, self._append, self._end, self._publish, self._move_cursor]
        self.dice.choice(says)()
        self._desk.tick(0.1)

    def _submit(self) -> None:
        self._submitted += 1
        self._desk.submit(f"r-{self._submitted}")

    def _beat(self) -> None:
        for worker in WORKERS:
            self._desk.beat(worker, 3, *self._desk.held(worker))

    def _append(self) -> None:
        producer = self.dice.choice(PRODUCERS)
        held = [claim for worker in WORKERS for claim in self._desk.held(worker)]
        scopes = [self.dice.choice([("", 0), *held]) for _ in range(self.dice.randint(1, 3))]
        self._seqs[producer] += 1
        answer = self._desk.append(producer, 1, self._seqs[producer], *((*scope, self._body()) for scope in scopes))
        assert isinstance(answer, m.Acked)

    def _end(self) -> None:
        worker = self.dice.choice(WORKERS)
        for claim in self._desk.held(worker)[:1]:
            end = self.dice.choice([m.Done(*claim, 0.5), m.Fail(*claim, "it broke")])
            answer = self._desk.say(worker, end, [self._body()], count=1)
            assert isinstance(answer, m.Accepted)

    def _publish(self) -> None:
        self._published += 1
        answer = self._desk.say("t", m.Put(Resource("policy", self._published, self._body())))
        assert isinstance(answer, m.Accepted)

    def _move_cursor(self) -> None:
        self._cursor = self.dice.randint(self._cursor, len(self.log.records))
        answer = self._desk.say("t", m.Commit("trainer", self._cursor))
        assert isinstance(answer, m.CursorAt)

    def _body(self) -> bytes:
        return self.dice.randbytes(self.dice.choice(BODY_BYTES))


if __name__ == "__main__":
    main()
