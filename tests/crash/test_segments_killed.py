"""The broker is killed while its log goes on in a new segment, and while old ones are dropped: at every step of either.

The process ends itself, as abruptly as SIGKILL would, at the n-th thing it asks of the file system; n grows until it
lives to the end. What LMDB does in between is cut everywhere by test_power_loss.py.
"""

from __future__ import annotations

import subprocess
import sys
from contextlib import closing
from pathlib import Path

import msgspec
import pytest

from lightning_bus.log.codec import decode_record
from lightning_bus.log.layout import find_segments
from lightning_bus.log.reader import LogReader
from lightning_bus.log.store import LogWriter
from lightning_bus.records import Kind, Put, Record, Table
from tests.bus_fixtures import ROOT

MAP_BYTES = 1 << 30
SEGMENT_BYTES = 64 << 10
SURVIVED = 0
KILLED = 9
STEPS_MAX = 60

_LIFE = """
import os, sys
from pathlib import Path
from tests.crash.test_segments_killed import commit_next, open_log

log, steps = open_log(Path(sys.argv[1])), int(sys.argv[2])
while len(log.segments()) < 3:
    print(commit_next(log), flush=True)

def count(event, arguments):
    global steps
    if event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "open", "os.listdir"):
        steps -= 1
        if steps < 0:
            os._exit(9)

sys.addaudithook(count)
while len(log.segments()) < 4:
    print(commit_next(log), flush=True)
log.drop_before(log.segments()[2].first_offset)
print(commit_next(log), flush=True)
os._exit(0)
"""


def open_log(path: Path) -> LogWriter:
    return LogWriter(path, map_bytes_max=MAP_BYTES, segment_bytes=SEGMENT_BYTES)


def commit_next(log: LogWriter) -> int:
    """Commit a record and, with it, a cursor at its end. Returns how many records are acknowledged then."""
    end = log.end_offset + 1
    record = Record(end - 1, Kind.SPANS, "p", 1, end, 0, "", 0, 1, 0, b"x" * 10_000)
    log.commit([record, Put(Table.CURSORS, b"c", msgspec.msgpack.encode(end))])
    return end


@pytest.mark.crash
@pytest.mark.timeout(900)
def test_killed_at_any_step_of_a_new_segment_or_of_dropping_one_the_log_opens_with_everything(tmp_path: Path) -> None:
    seen: set[int] = set()
    for steps in range(STEPS_MAX):
        path = tmp_path / str(steps)
        command = [sys.executable, "-c", _LIFE, str(path), str(steps)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        assert done.returncode in (SURVIVED, KILLED)
        acked = int(done.stdout.split()[-1])
        seen.add(len(find_segments(path)))
        with closing(open_log(path)) as log:
            end, first = log.end_offset, log.first_offset
            assert acked <= end <= acked + 1
            assert log.load().cursors == {"c": end}
            assert log.read(end - 1, 1)[0]
            commit_next(log)
        with LogReader(path) as reader:
            assert [decode_record(value).offset for value in reader.values()] == list(range(first, end + 1))
        if done.returncode == SURVIVED:
            assert first > 0
            assert seen >= {2, 3, 4}, "killed before and after each"
            return
    pytest.fail(f"it asked more than {STEPS_MAX} things of the file system")
