"""What a power cut could have left of a log, opened again and compared with what had been promised by then.

    python -m tests.crash.power_loss.checker TRACE SCRATCH SEED COMMITS FIRST STATES

prints two JSON objects a state, one before it is opened and one that says what was found.

A state is a moment in a trace that shim.c made of workload.py, and a choice of what was on the disk at that moment;
disk.py says what may be chosen. The state's number and the seed fix both, so a failure is seen again by asking for that
state alone.

Watched: the log opens; it holds the transactions of some beginning of the workload, each whole, records and tables
alike; none that was acknowledged is missing, and at most the one that was under way is there besides; the log takes the
next transaction, and then every record is there, from the first on that the workload has not dropped, its checksum
right. Not watched: the run's own directory, which is taken to be on disk; disks that lie about a sync, or tear within
512 bytes.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import NamedTuple

import lmdb

from lightning_bus.broker import core
from lightning_bus.broker.core import Snapshot
from lightning_bus.errors import LightningBusError, StorageError
from lightning_bus.log.reader import LogReader
from lightning_bus.records import Record, Write
from tests.bus_fixtures import ROOT
from tests.core_harness import MemoryLog
from tests.crash.power_loss.disk import Disk, read_trace
from tests.crash.power_loss.workload import COMMITS_KEPT, open_log, transactions

LOST = "lost"  # how the worst finding starts


class Finding(NamedTuple):
    """What was seen of one state."""

    state: int
    cut: int  # the trace's entries before this one had happened
    acked: int  # transactions acknowledged by then; -1 before the log was open for the first time
    wrong: str  # empty when all is well

    def __str__(self) -> str:
        return f"state {self.state}, cut before entry {self.cut} of the trace, {self.acked} acknowledged: {self.wrong}"


def examine(trace: Path, scratch: Path, *, seed: int, commits: int, states: int, first: int = 0) -> list[Finding]:
    """Return what was found in each of these states, looked at in a process of their own: LMDB may die of a bad file."""
    numbers = [str(number) for number in (seed, commits, first, states)]
    command = [sys.executable, "-m", "tests.crash.power_loss.checker", str(trace), str(scratch), *numbers]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    findings = [Finding(**line) for line in lines if "wrong" in line]
    if done.returncode != 0:
        last = lines[-1] if lines else {"state": first, "cut": 0, "acked": -1}
        findings.append(Finding(**{**last, "wrong": f"the process that looked at it ended with {done.returncode}"}))
    return findings


def main() -> None:
    trace, scratch = Path(sys.argv[1]), Path(sys.argv[2])
    seed, commits, first, states = map(int, sys.argv[3:])
    entries = list(read_trace(trace))
    history = History(list(transactions(seed, commits + 1)))  # one more, for the log to go on with
    dice = {number: Random(f"{seed} {number}") for number in range(first, first + states)}
    cuts = {number: dice[number].randrange(len(entries) + 1) for number in dice}
    disk = Disk(trace.parent)
    acked = -1
    happened = 0
    for number, cut in sorted(cuts.items(), key=lambda item: item[1]):
        for entry in entries[happened:cut]:
            disk.take(entry)
            acked += entry.kind == "A"
        happened = cut
        begun = {"state": number, "cut": cut, "acked": acked}
        print(json.dumps(begun), flush=True)
        under_way = entries[cut] if cut < len(entries) else None
        files = disk.after_power_loss(dice[number], under_way)
        print(json.dumps({**begun, "wrong": look(files, scratch, history, acked)}), flush=True)


def look(files: Mapping[Path, bytes | None], scratch: Path, history: History, acked: int) -> str:
    """Open a log in a directory that holds these files and return what is wrong with it, or nothing."""
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    for name, content in files.items():  # directories come before what is in them, without content
        if content is None:
            (scratch / name).mkdir()
        else:
            (scratch / name).write_bytes(content)
    try:
        log = open_log(scratch)
        try:
            held = history.held(log.load())
            if held is None:
                return "it holds what it never held at the end of a transaction"
            if held < acked:
                return f"{LOST}: transaction {acked} was acknowledged, the log ends with {held}"
            if held > max(acked, 0) + 1:
                return f"it holds transaction {held}; after {acked} only one was under way"
            log.commit(history.transactions[held])
            if history.held(log.load()) != held + 1:
                return f"it opens with {held} transactions and does not take the next"
        finally:
            log.close()
        with LogReader(scratch / "log") as reader:
            if reader.first_offset > history.end_offset(max(0, held - COMMITS_KEPT)):
                return f"it begins at record {reader.first_offset}, which nobody dropped"
            found = list(reader.records())
            expected = history.records(held + 1)[reader.first_offset :]
            if missing := sorted(record.offset for record in set(expected) - set(found)):
                return f"{LOST}: of {held + 1} transactions the records {missing} are missing or not what was written"
            if found != expected:
                return f"of {held + 1} transactions there are records that nobody wrote"
    except StorageError as exc:
        # A log that was still being made when the power went has promised nothing, and may say that it is none.
        return "" if acked < 0 else repr(exc)
    except (LightningBusError, lmdb.Error) as exc:
        return repr(exc)
    return ""


class History:
    """What the log holds after each transaction of the workload."""

    def __init__(self, transactions: list[list[Write]]) -> None:
        self.transactions = transactions
        memory = MemoryLog()
        self._snapshots = [memory.snapshot()]
        for writes in transactions:
            memory.commit(core.Effects(writes))
            self._snapshots.append(memory.snapshot())
        self._records = memory.records

    def held(self, snapshot: Snapshot) -> int | None:
        """Return how many transactions make this snapshot, records and tables together; None when no number does."""
        whole = replace(snapshot, first_offset=0)  # what was dropped is looked at on its own
        return next((i for i, expected in reversed(list(enumerate(self._snapshots))) if expected == whole), None)

    def end_offset(self, count: int) -> int:
        """Return how many records the first `count` transactions have."""
        return self._snapshots[count].next_offset

    def records(self, count: int) -> list[Record]:
        """Return the records of the first `count` transactions."""
        return self._records[: self.end_offset(count)]


if __name__ == "__main__":
    main()
