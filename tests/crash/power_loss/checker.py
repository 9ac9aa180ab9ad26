"""What a power cut could have left of a log, opened again and compared with what had been promised by then.

    python -m tests.crash.power_loss.checker TRACE SCRATCH SEED COMMITS FIRST STATES

prints two JSON objects a state, one before it is opened and one that says what was found.

A state is a moment in a trace that shim.c made of workload.py, and a choice of what was on the disk at that moment.
Everything synced is; of what was written since, anything may be and anything may be missing, in no order, torn at each
512 bytes. The state's number and the seed fix both, so a failure is seen again by asking for that state alone.

Watched: the log opens; it holds the transactions of some beginning of the workload, each whole, records and tables
alike; none that was acknowledged is missing, and at most the one that was under way is there besides; the log takes the
next transaction, and then every record from the first on is there, its checksum right. Not watched: the directory that
holds the file, which is taken to be on disk; disks that lie about a sync, or tear within 512 bytes.
"""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import NamedTuple

import lmdb

from lightning_bus.broker import core
from lightning_bus.broker.core import Snapshot
from lightning_bus.errors import LightningBusError, StorageError
from lightning_bus.log.store import LogReader, LogWriter
from lightning_bus.records import Record, Write
from tests.bus_fixtures import ROOT
from tests.core_harness import MemoryLog
from tests.crash.power_loss.workload import MAP_BYTES_MAX, transactions

SECTOR = 512  # what a disk writes whole or not at all
LOST = "lost"  # how the worst finding starts
_ENTRY = struct.Struct("<BB6xQQ")


class Entry(NamedTuple):
    """One line of the trace; shim.c says what the kinds mean."""

    kind: str
    durable: bool
    offset: int
    length: int
    data: bytes


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
    disk = Disk()
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
        file = disk.after_power_loss(dice[number], under_way)
        print(json.dumps({**begun, "wrong": look(file, scratch, history, acked)}), flush=True)


def look(file: bytes, scratch: Path, history: History, acked: int) -> str:
    """Open a log whose data.mdb is `file` and return what is wrong with it, or nothing."""
    scratch.mkdir(parents=True, exist_ok=True)
    (scratch / "lock.mdb").unlink(missing_ok=True)
    (scratch / "data.mdb").write_bytes(file)
    try:
        log = LogWriter(scratch, map_bytes_max=MAP_BYTES_MAX)
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
        with LogReader(scratch) as reader:
            if list(reader.records()) != history.records(held + 1):
                return f"of {held + 1} transactions the records are not what was written"
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
        return next((i for i, expected in reversed(list(enumerate(self._snapshots))) if expected == snapshot), None)

    def records(self, count: int) -> list[Record]:
        """Return the records of the first `count` transactions."""
        return self._records[: self._snapshots[count].next_offset]


class Disk:
    """One file, as the process sees it and as a power cut would leave it."""

    def __init__(self) -> None:
        self._seen = bytearray()
        self._durable = bytearray()
        self._pending: dict[int, list[tuple[int, bytes]]] = {}  # sector → (write, content) since it was last synced
        self._writes = 0

    def take(self, entry: Entry) -> None:
        """Let a call of the process happen."""
        if entry.kind == "W":
            sectors = self._write(entry)
            if entry.durable:  # its own bytes are on disk now; what other calls wrote is not
                _grow(self._durable, entry.offset + entry.length)
                for sector in sectors:
                    self._put(self._durable, sector, self._pending.pop(sector)[-1][1])
        elif entry.kind == "T":
            raise ValueError(f"the log set its file's size to {entry.length}: tell this model what that leaves on disk")
        elif entry.kind == "S":
            self._durable[:] = self._seen
            self._pending.clear()

    def after_power_loss(self, dice: Random, under_way: Entry | None) -> bytes:
        """Return a file that a power cut could leave now, while this call is under way."""
        pending = {sector: list(versions) for sector, versions in self._pending.items()}
        seen = bytes(self._seen)
        if under_way is not None and under_way.kind == "W":
            self._write(under_way)
            pending, self._pending = self._pending, pending
        file = bytearray(self._durable)
        # How long the file is, is written on its own too. What was written beyond its end is not in it.
        size = dice.choice((len(file), len(self._seen), dice.randint(len(file), len(self._seen))))
        _grow(file, size)
        survives = _survivors(dice)
        for sector, versions in pending.items():
            kept = [content for write, content in versions if survives(write)]
            if kept:
                self._put(file, sector, kept[-1])
        self._seen[:] = seen
        return bytes(file[:size])

    def _write(self, entry: Entry) -> range:
        end = entry.offset + entry.length
        _grow(self._seen, end)
        self._seen[entry.offset : end] = entry.data
        sectors = range(entry.offset // SECTOR, -(-end // SECTOR))
        self._writes += 1
        for sector in sectors:
            content = bytes(self._seen[sector * SECTOR : (sector + 1) * SECTOR])
            self._pending.setdefault(sector, []).append((self._writes, content))
        return sectors

    @staticmethod
    def _put(file: bytearray, sector: int, content: bytes) -> None:
        _grow(file, sector * SECTOR + len(content))
        file[sector * SECTOR : sector * SECTOR + len(content)] = content


def _survivors(dice: Random) -> Callable[[int], bool]:
    """Return who decides, sector by sector, whether a write that was never synced reached the disk all the same."""
    how = dice.choice(("none", "all", "some writes", "some sectors", "most sectors", "few sectors"))
    if how == "some writes":  # whole, in any order
        kept: dict[int, bool] = {}
        return lambda write: kept.setdefault(write, dice.random() < 0.5)
    chance = {"none": 0.0, "all": 1.0, "some sectors": 0.5, "most sectors": 0.95, "few sectors": 0.05}[how]
    return lambda write: dice.random() < chance


def read_trace(path: Path) -> Iterator[Entry]:
    """Yield the entries of a trace."""
    trace = path.read_bytes()
    at = 0
    while at < len(trace):
        kind, durable, offset, length = _ENTRY.unpack_from(trace, at)
        at += _ENTRY.size
        data = trace[at : at + length] if chr(kind) in "WA" else b""
        at += len(data)
        yield Entry(chr(kind), bool(durable), offset, length, data)


def _grow(file: bytearray, size: int) -> None:
    file.extend(bytes(max(0, size - len(file))))


if __name__ == "__main__":
    main()
